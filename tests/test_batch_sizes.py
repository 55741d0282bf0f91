"""The engine's sizes fit the memory there is, and are as large as they may be."""

import jax.numpy as jnp
import pytest
from asking import LOADED, ask, make_engine

import mllama_jax as mj
from mllama_jax.batch.sizes import choose_options, describe, needed_memory
from mllama_jax.plan.topology import parse_topology

MODEL = LOADED[0]
GIB = 2**30


@pytest.fixture(scope="module")
def released():
    """The 11B model on eight chips, without its parameters."""
    mesh = parse_topology("v5e:2x4").mesh("data=2,tensor=4")
    return mj.MllamaForConditionalGeneration(mj.MllamaConfig(), dtype=jnp.bfloat16, mesh=mesh)


def test_more_memory_makes_room_for_more(released):
    chosen = [choose_options(released, memory=gib * GIB) for gib in (2, 3, 4, 8, 16)]
    for gib, options in zip((2, 3, 4, 8, 16), chosen, strict=True):
        assert needed_memory(released, options) < gib * GIB
        assert options.num_slots % 2 == 0  # each half of the devices has as many
    sizes = [options.num_slots * options.max_length for options in chosen]
    assert sizes == sorted(set(sizes))
    assert chosen[-1].max_length == 4096
    assert chosen[-1].max_tiles == 16
    assert chosen[-1].num_slots >= 64


def test_what_is_given_is_kept(released):
    options = choose_options(released, num_slots=6, max_length=768, max_tiles=5, memory=4 * GIB)
    assert (options.num_slots, options.max_length, options.max_tiles) == (6, 768, 5)
    assert options.max_length % options.prompt_lengths[-1] == 0
    assert options.tile_counts == (4, 5)


def test_too_little_memory_is_said(released):
    with pytest.raises(ValueError, match=r"0\.50 GiB of each device's memory is free .* needs 1\."):
        choose_options(released, memory=GIB // 2)
    with pytest.raises(ValueError, match="for 1000 slots"):
        choose_options(released, num_slots=1000, memory=4 * GIB)


def test_the_system_is_asked_where_no_device_knows():
    options = choose_options(MODEL)
    # A CPU's products are no cheaper a token with more slots.
    assert options.num_slots == 8
    assert options.max_length == min(4096, MODEL.text_config.max_position_embeddings)
    text = describe(MODEL, options)
    assert f"8 slots of {options.max_length} tokens and 16 tiles (4 whole pictures)" in text


def test_encoded_pictures_do_not_pile_up():
    engine = make_engine(num_slots=6, pictures_kept=1, pictures_at_once=(1,))
    most = 0
    encode = engine._device.encode

    def watched(pictures):
        nonlocal most
        encode(pictures)
        most = max(most, len(engine._device._features))

    engine._device.encode = watched
    requests = [ask(f"{i}", "Which digits?", 2 * i, 2 * i + 1, max_tokens=2) for i in range(4)]
    assert len(list(engine.run(requests))) == 4
    assert most == 1 + 2  # one that is kept, two of a request
