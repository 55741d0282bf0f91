"""The engine's sizes fit the memory there is, and are as large as they may be."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from asking import LOADED, ask, make_engine

import mllama_jax as mj
from mllama_jax.batch.host_memory import available_memory
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
    assert options.prompt_lengths[-1] == 256
    assert options.tile_counts == (4, 5)


@pytest.mark.parametrize(
    ("length", "chunk", "room"),
    [
        *((2001, 512, 2048), (2000, 512, 2048), (2048, 512, 2048), (1025, 128, 1152)),
        *((96, 32, 96), (100, 128, 128), (33, 64, 64), (2, 32, 32), (131071, 512, 131072)),
    ],
)
def test_any_length_is_read_in_large_chunks(released, length, chunk, room):
    options = choose_options(released, num_slots=2, max_length=length, max_tiles=4, memory=99 * GIB)
    assert options.max_length == length
    assert (options.prompt_lengths[-1], options.cache_length) == (chunk, room)


def test_impossible_sizes_are_refused_by_name(released):
    with pytest.raises(ValueError, match=r"--num-slots\) is 0; expected at least 1; ") as caught:
        choose_options(released, num_slots=0, max_length=0, max_tiles=0, memory=4 * GIB)
    assert "max_length (--max-length) is 0; expected 2 to 131072, the pos" in str(caught.value)
    assert "max_tiles (--max-tiles) is 0; expected at least 4, the tiles of one" in str(
        caught.value
    )
    with pytest.raises(ValueError, match="is 131073; expected 2 to 131072"):
        choose_options(released, max_length=131073, memory=4 * GIB)


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


def groups(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("base", ["sys/fs/cgroup", "sys/fs/cgroup/pods/one"])
def test_a_container_has_no_more_memory_than_it_is_allowed(tmp_path, base):
    root = groups(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/one/inner\n",
            f"{base}/memory.max": "5000000\n",
            f"{base}/memory.current": "4000000\n",
            f"{base}/memory.stat": "anon 100\ninactive_file 1500000\nactive_file 7\n",
            "sys/fs/cgroup/pods/one/inner/memory.max": "max\n",
            "sys/fs/cgroup/pods/one/inner/memory.current": "1\n",
            "sys/fs/cgroup/pods/one/inner/memory.stat": "inactive_file 0\n",
        },
    )
    assert available_memory(root) == 2_500_000


def test_so_does_one_of_the_older_kind(tmp_path):
    memory = "sys/fs/cgroup/memory"
    root = groups(
        tmp_path,
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/\n4:memory:/docker/outside\n0::/\n",
            f"{memory}/memory.limit_in_bytes": "3000000\n",
            f"{memory}/memory.usage_in_bytes": "2500000\n",
            f"{memory}/memory.stat": "inactive_file 1\ntotal_inactive_file 200000\n",
        },
    )
    assert available_memory(root) == 700_000
    (root / memory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert available_memory(root) > 10_000_000
    (root / memory / "memory.limit_in_bytes").write_text("2000000\n")
    assert available_memory(root) == 0


def test_without_groups_cached_files_count_as_free(tmp_path):
    fields = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    available = next(int(kib) for name, kib, *_ in fields if name == "MemAvailable:") * 1024
    assert available_memory(tmp_path) == pytest.approx(available, rel=0.1)


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
