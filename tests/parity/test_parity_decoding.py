"""Prefill and cached steps against transformers' dynamic cache; greedy tokens along the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from closeness import assert_close
from hf_reference import Pair, make_batch, to_torch
from transformers.cache_utils import DynamicCache

STEPS = 4
CASES = {
    "right": ("aperiodic", [[1, 3, 6], [2], []], [9, 11, 7]),
    "left": ("periodic", [[0, 1], [3, 5]], [6, 8]),
}


@pytest.mark.parametrize("side", list(CASES))
def test_cached_decoding(side: str, request: pytest.FixtureRequest):
    name, images, lengths = CASES[side]
    pair: Pair = request.getfixturevalue(name)
    batch = make_batch(pair.config, images, lengths, side, seed=11)
    del batch["labels"]
    B, T = batch["input_ids"].shape
    real = batch["attention_mask"].astype(bool)
    # As `generate` continues them: the mask grows by ones, the last row of the tiles is repeated.
    whole_mask = np.pad(batch["attention_mask"], ((0, 0), (0, STEPS)), constant_values=1)
    tiles = batch["cross_attention_mask"]
    whole_tiles = np.concatenate([tiles, np.repeat(tiles[:, -1:], STEPS, axis=1)], axis=1)

    V = np.prod(batch["aspect_ratio_mask"].shape[1:]) * pair.vision_config.num_patches
    cache = pair.model.init_cache(B, T + STEPS, int(V))
    run = jax.jit(lambda params, **inputs: pair.model.apply({"params": params}, **inputs))
    past = DynamicCache()
    with torch.no_grad():
        expected = pair.reference(**to_torch(batch), past_key_values=past, use_cache=True)
    output = run(pair.params, **batch, past_key_values=cache)
    assert_close(output.logits, expected.logits, "prefill", where=real)

    for step in range(STEPS):
        slot = T + step
        tokens = expected.logits[:, -1:].argmax(-1)
        np.testing.assert_array_equal(output.logits[:, -1:].argmax(-1), tokens)
        with torch.no_grad():
            expected = pair.reference(
                input_ids=tokens,
                attention_mask=torch.from_numpy(whole_mask[:, : slot + 1]),
                cross_attention_mask=torch.from_numpy(whole_tiles[:, : slot + 1]),
                cache_position=torch.tensor([slot]),
                past_key_values=past,
                use_cache=True,
            )
        inputs = {
            "input_ids": jnp.asarray(tokens.numpy()),
            "attention_mask": whole_mask,
            "past_key_values": output.past_key_values,
        }
        if step % 2:  # transformers' way: the whole mask and the place in it
            inputs |= {"cross_attention_mask": whole_tiles, "cache_position": jnp.array([slot])}
        else:
            inputs |= {"cross_attention_mask": whole_tiles[:, slot : slot + 1]}
        output = run(pair.params, **inputs)
        assert int(output.past_key_values.length) == slot + 1
        assert_close(output.logits, expected.logits, f"step {step}")
