"""Greedy continuations, token by token, against transformers' `generate`."""

from typing import Any

import hf_reference
import numpy as np
import pytest
import tokenizers
import torch
from hf_reference import Batch, Pair
from transformers import PreTrainedTokenizerFast

from mllama_jax.generation.generate import GenerateOutput

NEW = 20


def inputs_for(
    pair: Pair, images: list[list[int]], lengths: list[int], side: str = "left"
) -> Batch:
    batch = hf_reference.make_batch(pair.config, images, lengths, side, seed=23)
    return {name: values for name, values in batch.items() if name != "labels"}


def both(pair: Pair, batch: Batch, **options: Any) -> tuple[np.ndarray, GenerateOutput]:
    """transformers' sequences and our output."""
    options = {"max_new_tokens": NEW, **options}
    with torch.no_grad():
        theirs = pair.reference.generate(**hf_reference.to_torch(batch), do_sample=False, **options)
    return theirs.numpy(), pair.model.generate(pair.params, **batch, **options)


MIXED = ([[2, 5], [], [0]], [9, 6, 4])


@pytest.fixture(scope="module")
def mixed(aperiodic: Pair) -> Batch:
    return inputs_for(aperiodic, *MIXED)


def test_mixed_batch(aperiodic: Pair, mixed: Batch):
    """Two pictures, none and one, in prompts of different lengths."""
    theirs, ours = both(aperiodic, mixed, eos_token_id=[])
    np.testing.assert_array_equal(ours.sequences, theirs)
    assert ours.num_new_tokens.tolist() == [NEW] * 3


def test_end_tokens_and_padding(aperiodic: Pair, mixed: Batch):
    free = both(aperiodic, mixed, eos_token_id=[])[1].new_tokens
    ends = [int(free[0, 6]), int(free[1, 2])]
    theirs, ours = both(aperiodic, mixed, eos_token_id=ends, pad_token_id=5)
    np.testing.assert_array_equal(ours.sequences, theirs)
    assert "stop" in ours.finish_reason
    theirs, ours = both(aperiodic, mixed, eos_token_id=ends, pad_token_id=5, min_new_tokens=8)
    np.testing.assert_array_equal(ours.sequences, theirs)
    assert ours.num_new_tokens.min() > 8


def test_default_length(aperiodic: Pair, mixed: Batch):
    theirs, ours = both(aperiodic, mixed, max_new_tokens=None)
    np.testing.assert_array_equal(ours.sequences, theirs)
    theirs, ours = both(aperiodic, mixed, max_new_tokens=None, max_length=19)
    np.testing.assert_array_equal(ours.sequences, theirs)


def test_other_configuration(periodic: Pair):
    """A scanned decoder, two tiles an image, one channel; longer than a bucket of prompts."""
    batch = inputs_for(periodic, [[0, 3, 33], [1]], [35, 20])
    theirs, ours = both(periodic, batch, eos_token_id=[])
    np.testing.assert_array_equal(ours.sequences, theirs)


def test_text_alone(periodic: Pair):
    theirs, ours = both(periodic, inputs_for(periodic, [[], []], [7, 3]))
    np.testing.assert_array_equal(ours.sequences, theirs)


def letters(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are one to three letters."""
    alphabet = [chr(ord("a") + i) for i in range(26)]
    pieces = [*alphabet, *(a + b for a in alphabet[:10] for b in alphabet[:3])]
    pieces += [3 * a for a in alphabet]
    vocabulary = {piece: i for i, piece in enumerate(pieces[: count - 1])} | {"?": count - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.mark.parametrize("row", [0, 1, 2])
def test_stop_strings(aperiodic: Pair, mixed: Batch, row: int):
    tokenizer = letters(105)  # those of the embedding, padding rows included
    free = both(aperiodic, mixed, eos_token_id=[])[1].new_tokens[row]
    pieces = [tokenizer.decode([token]) for token in free]
    # Ends with the first letter of a token.
    stop = pieces[7][-1] + pieces[8] + pieces[9][0]
    theirs, ours = both(
        aperiodic, mixed, eos_token_id=[], stop_strings=[stop, "qqq"], tokenizer=tokenizer
    )
    np.testing.assert_array_equal(ours.sequences, theirs)
    assert ours.finish_reason[row] == "stop"
    assert ours.num_new_tokens[row] <= 10
