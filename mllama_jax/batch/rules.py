"""The rules by which each row of a running batch chooses its tokens, made from a request's options.

Everything about a row is data of a fixed size: any request takes any row, and nothing recompiles.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mllama_jax.batch.requests import RequestError, SamplingOptions
from mllama_jax.generation.sampling import GREEDY, NO_MIN_P, NO_TOP_K, NO_TOP_P, SamplingParams
from mllama_jax.processing.tokenizer import MllamaTokenizer
from mllama_jax.shapes import Array, Bool, Float, Int, UInt

__all__ = [
    "BAD_WORDS",
    "BAD_WORD_LENGTH",
    "BIASED_TOKENS",
    "NO_LOGPROBS",
    "STOP_TOKENS",
    "TOP_LOGPROBS",
    "RowRules",
    "bad_word_tokens",
    "blank_rules",
    "ended_by",
    "make_row_rules",
    "pack_bits",
    "with_guide_masks",
    "with_row",
]

STOP_TOKENS = 32
"""Most stop tokens of a request."""

BIASED_TOKENS = 1024
"""Most tokens with a bias of a request."""

BAD_WORDS = 128
"""Most bad words of several tokens of a request; those of one token are not counted."""

BAD_WORD_LENGTH = 16
"""Most tokens of a bad word."""

TOP_LOGPROBS = 20
"""Most tokens whose log-probabilities are told in each place."""

NO_LOGPROBS = -1
NOTHING = -1
"""Fills what a request leaves free of its row's places for token ids."""

_LEAST_TEMPERATURE = 1e-5
_SEEDS = 2**32
_BITS = 32


@struct.dataclass
class RowRules:
    """How each row chooses its tokens and what ends it; arrays with one row a row of the batch.

    Attributes:
        sampling: temperature and filters.
        seed: uint32 (B,), of the draws.
        choice: int32 (B,), which of a request's answers it is; each draws its own tokens.
        presence_penalty, frequency_penalty, repetition_penalty: float32 (B,).
        min_tokens: int32 (B,), no end or stop token is chosen before so many new tokens.
        ignore_eos: bool (B,), the model's end tokens end nothing.
        stop_tokens: int32 (B, STOP_TOKENS), filled up with -1.
        num_logprobs: int32 (B,), -1 for none, 0 for the chosen token's alone.
        bias_tokens: int32 (B, BIASED_TOKENS), filled up with -1.
        bias: float32 (B, BIASED_TOKENS), added to their logits.
        bad_words: int32 (B, BAD_WORDS, BAD_WORD_LENGTH), at the right end, filled up with -1.
        restricted: bool (B,), whether `allowed` holds for the row.
        allowed: uint32 (B, ceil(W / 32)), a bit for each token that may be chosen, as `pack_bits`.
        guided: bool (B,), whether `guide` holds for the row.
        guide: uint32 (B, ceil(W / 32)), the tokens that may be chosen next; the host replaces it
            before each step of a guided row.
    """

    sampling: SamplingParams
    seed: UInt[Array, " B"]
    choice: Int[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    min_tokens: Int[Array, " B"]
    ignore_eos: Bool[Array, " B"]
    stop_tokens: Int[Array, "B stop_tokens"]
    num_logprobs: Int[Array, " B"]
    bias_tokens: Int[Array, "B biased_tokens"]
    bias: Float[Array, "B biased_tokens"]
    bad_words: Int[Array, "B bad_words bad_word_length"]
    restricted: Bool[Array, " B"]
    allowed: UInt[Array, "B words"]
    guided: Bool[Array, " B"]
    guide: UInt[Array, "B words"]


def make_row_rules(
    options: SamplingOptions,
    vocab_size: int,
    *,
    choice: int = 0,
    default_seed: int | None = None,
    bad_words: Sequence[Sequence[int]] = (),
    guide_mask: np.ndarray | None = None,
) -> RowRules:
    """A request's rules: one row, as NumPy arrays of about 50 kB.

    A seed draws what `generate` draws with it for the row of the number ``choice``.

    Args:
        options: their texts (``stop``, ``bad_words``, ``response_format``) are not read.
        vocab_size: W, the width of the logits.
        choice: which of the request's ``n`` answers it is, from 0.
        default_seed: for a request that has none; None: drawn.
        bad_words: token ids of the bad words, see `bad_word_tokens`.
        guide_mask: uint32 (ceil(W / 32),), the tokens that a guide allows first; None: unguided.

    Raises:
        RequestError: more tokens or words than there are places for, or ids outside of the
            vocabulary.
    """
    _check_ids("stop_token_ids", options.stop_token_ids, vocab_size)
    _check_ids("logit_bias", options.logit_bias, vocab_size)
    _check_ids("allowed_token_ids", options.allowed_token_ids or (), vocab_size)
    if options.allowed_token_ids is not None and not options.allowed_token_ids:
        raise RequestError(
            "allowed_token_ids is empty, so that no token could be chosen: name at least one, or "
            "leave it out.",
            field="allowed_token_ids",
        )
    seed = options.seed if options.seed is not None else default_seed
    allowed = _allowed(options.allowed_token_ids, bad_words, vocab_size)
    nothing = np.zeros(-(-vocab_size // _BITS), np.uint32)
    return RowRules(
        sampling=_sampling_params(options, vocab_size),
        seed=_row(secrets.randbelow(_SEEDS) if seed is None else _as_seed(seed), np.uint32),
        choice=_row(choice, np.int32),
        presence_penalty=_row(options.presence_penalty, np.float32),
        frequency_penalty=_row(options.frequency_penalty, np.float32),
        repetition_penalty=_row(options.repetition_penalty, np.float32),
        min_tokens=_row(options.min_tokens, np.int32),
        ignore_eos=_row(options.ignore_eos, bool),
        stop_tokens=_row(_filled("stop_token_ids", options.stop_token_ids, STOP_TOKENS), np.int32),
        num_logprobs=_row(NO_LOGPROBS if options.logprobs is None else options.logprobs, np.int32),
        bias_tokens=_row(_filled("logit_bias", options.logit_bias, BIASED_TOKENS), np.int32),
        bias=_row(_biases(options.logit_bias), np.float32),
        bad_words=_row(_bad_word_table(bad_words), np.int32),
        restricted=_row(allowed is not None, bool),
        allowed=_row(nothing if allowed is None else pack_bits(allowed), np.uint32),
        guided=_row(guide_mask is not None, bool),
        guide=_row(nothing if guide_mask is None else guide_mask, np.uint32),
    )


def blank_rules(batch_size: int, vocab_size: int) -> RowRules:
    """Rules of rows that no request has taken yet: greedy, and nothing else."""
    row = make_row_rules(SamplingOptions(temperature=GREEDY), vocab_size, default_seed=0)
    return jax.tree.map(lambda leaf: np.repeat(leaf, batch_size, axis=0), row)


def with_row(rules: RowRules, slot: Int[Array, ""], row: RowRules) -> RowRules:
    """The rules with one row replaced.

    Args:
        slot: int32, which.
        row: one row, from `make_row_rules`.
    """

    def replaced(whole: Array, one: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, one, slot, axis=0)

    return jax.tree.map(replaced, rules, row)


def with_guide_masks(
    rules: RowRules, masks: UInt[Array, "B words"], rows: Bool[Array, " B"]
) -> RowRules:
    """The rules with the guides' masks replaced in the rows that ``rows`` names."""
    return replace(rules, guide=jnp.where(rows[:, None], masks, rules.guide))


def pack_bits(allowed: np.ndarray) -> np.ndarray:
    """uint32 (ceil(W / 32),) from bool (W,): token ``i`` is bit ``i % 32`` of word ``i // 32``."""
    padded = np.pad(allowed, (0, -len(allowed) % _BITS))
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def bad_word_tokens(words: Sequence[str], tokenizer: MllamaTokenizer) -> list[tuple[int, ...]]:
    """The token ids of bad words, at the start of a text and after a space.

    What is spelled otherwise, with capitals or with other tokens, is not covered.

    Source: vLLM, sampling_params.py: update_from_tokenizer (both spellings).
    """
    texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
    ids = (
        tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        for text in texts
        if text.strip()
    )
    return list(dict.fromkeys(ids))


def ended_by(
    token_id: int, options: SamplingOptions, eos_token_ids: Collection[int]
) -> tuple[bool, int | None]:
    """Whether a token ends an answer, and the stop token if it is one.

    None stands for the model's own end tokens; a token that is both counts as an end token, unless
    the request ignores these.
    """
    if token_id in eos_token_ids and not options.ignore_eos:
        return True, None
    stops = token_id in options.stop_token_ids
    return stops, token_id if stops else None


def _sampling_params(options: SamplingOptions, vocab_size: int) -> SamplingParams:
    greedy = options.temperature < _LEAST_TEMPERATURE
    # A filter that would change nothing must not cost the other rows anything.
    top_k = NO_TOP_K if greedy or options.top_k >= vocab_size else options.top_k
    return SamplingParams(
        temperature=_row(GREEDY if greedy else options.temperature, np.float32),
        top_k=_row(top_k, np.int32),
        top_p=_row(NO_TOP_P if greedy else options.top_p, np.float32),
        min_p=_row(NO_MIN_P if greedy else options.min_p, np.float32),
    )


def _row(value: Any, dtype: type) -> Any:
    """One row's value as a batch of one row."""
    return np.asarray(value, dtype)[None]


def _as_seed(seed: int) -> int:
    """Seeds from 0 to 2**32 - 1 as they are; any other integer stands for one of these."""
    if 0 <= seed < _SEEDS:
        return seed
    entropy = [abs(seed) % _SEEDS, abs(seed) // _SEEDS, int(seed < 0)]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _allowed(
    only: Collection[int] | None, bad_words: Sequence[Sequence[int]], vocab_size: int
) -> np.ndarray | None:
    """bool (W,), or None if all tokens may be chosen. Bad words of one token are ruled out here."""
    single = [word[0] for word in bad_words if len(word) == 1 and word[0] < vocab_size]
    if only is None and not single:
        return None
    allowed = np.full(vocab_size, only is None)
    allowed[list(only or ())] = True
    allowed[single] = False
    return allowed


def _bad_word_table(bad_words: Sequence[Sequence[int]]) -> np.ndarray:
    words = [word for word in bad_words if len(word) > 1]
    longest = max(map(len, words), default=0)
    if len(words) > BAD_WORDS or longest > BAD_WORD_LENGTH:
        raise RequestError(
            f"bad_words has {len(words)} words of several tokens (a word counts twice: alone and "
            f"after a space), the longest with {longest}; there is room for {BAD_WORDS} of "
            f"{BAD_WORD_LENGTH} tokens.",
            field="bad_words",
        )
    table = np.full((BAD_WORDS, BAD_WORD_LENGTH), NOTHING, np.int32)
    for row, word in zip(table, words, strict=False):
        row[-len(word) :] = word
    return table


def _biases(bias: Mapping[int, float]) -> np.ndarray:
    values = np.zeros(BIASED_TOKENS, np.float32)
    values[: len(bias)] = list(bias.values())
    return values


def _filled(field: str, ids: Collection[int], size: int) -> np.ndarray:
    if len(ids) > size:
        raise RequestError(f"{field} has {len(ids)} tokens; there is room for {size}.", field=field)
    filled = np.full(size, NOTHING, np.int32)
    filled[: len(ids)] = list(ids)
    return filled


def _check_ids(field: str, ids: Collection[int], vocab_size: int) -> None:
    wrong = sorted(id for id in ids if not 0 <= id < vocab_size)
    if wrong:
        raise RequestError(
            f"{field} has {', '.join(map(str, wrong[:5]))}{' …' if len(wrong) > 5 else ''}; the "
            f"model's tokens are 0 to {vocab_size - 1}.",
            field=field,
        )
