"""The next token of every row of a running batch, each by its own rules, as pure functions.

What no active row asks for costs nothing: every part stands behind a condition on the rules.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from mllama_jax.batch.rules import BAD_WORD_LENGTH, NO_LOGPROBS, NOTHING, TOP_LOGPROBS, RowRules
from mllama_jax.generation.sampling import (
    GREEDY,
    NO_MIN_P,
    NO_TOP_K,
    NO_TOP_P,
    first_of_largest,
    sample,
)
from mllama_jax.shapes import Array, Bool, Float, Int

__all__ = ["RowHistory", "apply_rules", "choose", "is_end", "with_prompt"]

NO_REPETITION_PENALTY = 1.0


@struct.dataclass
class RowHistory:
    """What each row's rules have to know about its text so far.

    Attributes:
        counts: int32 (B, W), how often each token stands in the answer.
        in_prompt: bool (B, W), which tokens stand in the prompt.
        last: int32 (B, BAD_WORD_LENGTH - 1), the newest tokens of the answer, the newest at the
            right, -1 where there is none yet.
    """

    counts: Int[Array, "B W"]
    in_prompt: Bool[Array, "B W"]
    last: Int[Array, "B past"]

    @classmethod
    def blank(cls, batch_size: int, vocab_size: int) -> "RowHistory":
        """Of rows that no request has taken yet."""
        return cls(
            counts=jnp.zeros((batch_size, vocab_size), jnp.int32),
            in_prompt=jnp.zeros((batch_size, vocab_size), bool),
            last=jnp.full((batch_size, BAD_WORD_LENGTH - 1), NOTHING, jnp.int32),
        )


def with_prompt(
    history: RowHistory,
    slot: Int[Array, ""],
    input_ids: Int[Array, " T"],
    is_prompt: Bool[Array, " T"],
    is_first: Bool[Array, ""],
) -> RowHistory:
    """The history with a piece of a row's prompt taken in.

    Args:
        slot: int32, which row.
        input_ids: the piece; ids outside of the vocabulary, such as the image token's, are left
            out.
        is_prompt: False for what pads the piece.
        is_first: whether it is the prompt's first piece; what the row held before is forgotten.
    """
    batch_size, vocab_size = history.counts.shape
    ids = jnp.where(is_prompt, input_ids, vocab_size)
    seen = jnp.zeros(vocab_size, bool).at[ids].set(True, mode="drop")
    here = (jnp.arange(batch_size) == slot)[:, None]
    forgotten = here & is_first
    return RowHistory(
        counts=jnp.where(forgotten, 0, history.counts),
        in_prompt=(history.in_prompt & ~forgotten) | (here & seen),
        last=jnp.where(forgotten, NOTHING, history.last),
    )


def choose(
    logits: Float[Array, "B W"],
    rules: RowRules,
    history: RowHistory,
    step: Int[Array, " B"],
    active: Bool[Array, " B"],
    is_eos: Bool[Array, " W"],
) -> tuple[Array, Array, Array, Array, RowHistory]:
    """Chooses every row's next token.

    In this order: allowed tokens and the guide's mask, bad words, ``min_tokens``, bias, repetition,
    frequency and presence penalty; then rows with temperature 0 take the first of the largest
    logits, and the others divide by the temperature, filter by top-k, top-p and min-p, and draw.
    What a row gets depends on its own logits, rules, history and step only, not on its place or on
    the other rows.

    A row whose rules leave no token at all gets the first end token.

    Args:
        logits: (B, W), computed with in float32.
        step: how many new tokens each row has so far.
        active: the rows whose result is looked at; the others cost nothing and learn nothing.
        is_eos: the model's end tokens.

    Returns:
        token: int32 (B,).
        logprob: float32 (B,), the token's log-probability by the logits as they came in; 0 if no
            active row asks for it.
        top_tokens: int32 (B, min(TOP_LOGPROBS, W)), the most likely tokens by the same, most
            likely first; 0 if no active row asks for any.
        top_logprobs: float32 (B, min(TOP_LOGPROBS, W)), theirs.
        history: with the active rows' tokens.

    Source: vLLM, v1/sample/sampler.py: Sampler.forward (the order up to the penalties, which
    log-probabilities) and ops/bad_words.py (only the answer counts); transformers 4.54.1,
    generation/utils.py: _get_logits_processor (the order from the temperature on; vLLM's has min-p
    before top-k and top-p).
    """
    logits = logits.astype(jnp.float32)
    scores = apply_rules(logits, rules, history, step, active, is_eos)
    sampling = replace(
        rules.sampling,
        temperature=jnp.where(active, rules.sampling.temperature, GREEDY),
        top_k=jnp.where(active, rules.sampling.top_k, NO_TOP_K),
        top_p=jnp.where(active, rules.sampling.top_p, NO_TOP_P),
        min_p=jnp.where(active, rules.sampling.min_p, NO_MIN_P),
    )
    token = sample(_keys(rules, step), scores, sampling)
    wanted = jnp.where(active, rules.num_logprobs, NO_LOGPROBS)
    return token, *_logprobs(logits, token, wanted), _with_token(history, token, active)


def is_end(
    token: Int[Array, " B"], rules: RowRules, is_eos: Bool[Array, " W"]
) -> Bool[Array, " B"]:
    """Which rows their newest token ends: an end token, unless ignored, or a stop token."""
    stops = jnp.any(rules.stop_tokens == token[:, None], axis=-1)
    return (is_eos[token] & ~rules.ignore_eos) | stops


def _keys(rules: RowRules, step: Array) -> Array:
    """(B,) random keys: those of `generate` for the row that is the choice's number."""

    def key(seed: Array, choice: Array, step: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), step)

    return jax.vmap(key)(rules.seed, rules.choice, step)


def apply_rules(
    logits: Float[Array, "B W"],
    rules: RowRules,
    history: RowHistory,
    step: Int[Array, " B"],
    active: Bool[Array, " B"],
    is_eos: Bool[Array, " W"],
) -> Float[Array, "B W"]:
    """The logits after everything in `choose` but temperature, filters and draw.

    Forbidden tokens have -inf; every row keeps at least one token.
    """
    parts: list[tuple[Array, Callable[[Array], Array]]] = [
        (rules.restricted | rules.guided, lambda scores: _only_allowed(scores, rules)),
        (
            jnp.any(rules.bad_words[..., -1] != NOTHING, axis=-1),
            lambda scores: _without_bad_words(scores, rules.bad_words, history.last),
        ),
        (step < rules.min_tokens, lambda scores: _without_ends(scores, rules, step, is_eos)),
        (
            jnp.any(rules.bias_tokens != NOTHING, axis=-1),
            lambda scores: jax.vmap(_add)(scores, rules.bias_tokens, rules.bias),
        ),
        (
            (rules.repetition_penalty != NO_REPETITION_PENALTY)
            | (rules.frequency_penalty != 0)
            | (rules.presence_penalty != 0),
            lambda scores: _penalised(scores, rules, history),
        ),
    ]
    asked = [jnp.any(rows & active) for rows, _ in parts]

    def shape(scores: Array) -> Array:
        for wanted, (_, part) in zip(asked, parts, strict=True):
            scores = jax.lax.cond(wanted, part, lambda scores: scores, scores)
        nothing_left = jnp.max(scores, axis=-1, keepdims=True) == -jnp.inf
        is_end = jnp.arange(scores.shape[-1]) == first_of_largest(is_eos.astype(jnp.float32))
        return jnp.where(nothing_left & is_end, 0.0, scores)

    return jax.lax.cond(jnp.any(jnp.stack(asked)), shape, lambda scores: scores, logits)


def _only_allowed(scores: Array, rules: RowRules) -> Array:
    everything = jnp.uint32(0xFFFFFFFF)
    allowed = jnp.where(rules.restricted[:, None], rules.allowed, everything)
    allowed &= jnp.where(rules.guided[:, None], rules.guide, everything)
    bits = (allowed[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.reshape(len(bits), -1)[:, : scores.shape[-1]]
    return jnp.where(bits == 1, scores, -jnp.inf)


def _without_bad_words(scores: Array, bad_words: Array, last: Array) -> Array:
    prefixes, ends = bad_words[..., :-1], bad_words[..., -1]
    matches = jnp.all((prefixes == last[:, None]) | (prefixes == NOTHING), axis=-1)
    return jax.vmap(_forbid)(scores, jnp.where(matches, ends, NOTHING))


def _without_ends(scores: Array, rules: RowRules, step: Array, is_eos: Array) -> Array:
    early = step < rules.min_tokens
    ends = is_eos & ~rules.ignore_eos[:, None]
    scores = jnp.where(early[:, None] & ends, -jnp.inf, scores)
    return jax.vmap(_forbid)(scores, jnp.where(early[:, None], rules.stop_tokens, NOTHING))


def _penalised(scores: Array, rules: RowRules, history: RowHistory) -> Array:
    """Source: transformers 4.54.1, generation/logits_process.py: RepetitionPenaltyLogitsProcessor;
    OpenAI's API reference and vLLM, model_executor/layers/utils.py: apply_penalties (the others).
    """
    repetition = rules.repetition_penalty[:, None]
    in_answer = history.counts > 0
    repeated = jnp.where(scores < 0, scores * repetition, scores / repetition)
    scores = jnp.where(in_answer | history.in_prompt, repeated, scores)
    scores -= rules.frequency_penalty[:, None] * history.counts
    return scores - rules.presence_penalty[:, None] * in_answer


def _forbid(scores: Float[Array, " W"], tokens: Int[Array, " n"]) -> Array:
    return scores.at[_or_outside(scores, tokens)].set(-jnp.inf, mode="drop")


def _add(scores: Float[Array, " W"], tokens: Int[Array, " n"], bias: Float[Array, " n"]) -> Array:
    return scores.at[_or_outside(scores, tokens)].add(bias, mode="drop")


def _or_outside(scores: Array, tokens: Array) -> Array:
    # A negative index would count from the end.
    return jnp.where(tokens == NOTHING, len(scores), tokens)


def _logprobs(logits: Array, token: Array, wanted: Array) -> tuple[Array, Array, Array]:
    """See `choose`; ``wanted`` is how many most likely tokens each row asks for."""
    batch_size, vocab_size = logits.shape
    width = min(TOP_LOGPROBS, vocab_size)

    def no_top(_: Array) -> tuple[Array, Array]:
        shape = (batch_size, width)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    def top(total: Array) -> tuple[Array, Array]:
        values, tokens = jax.lax.top_k(logits, width)
        return tokens, values - total

    def some() -> tuple[Array, Array, Array]:
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1) - total
        return chosen[:, 0], *jax.lax.cond(jnp.any(wanted > 0), top, no_top, total)

    def none() -> tuple[Array, Array, Array]:
        return jnp.zeros(batch_size, jnp.float32), *no_top(token)

    return jax.lax.cond(jnp.any(wanted != NO_LOGPROBS), some, none)


def _with_token(history: RowHistory, token: Array, active: Array) -> RowHistory:
    counts = jax.vmap(lambda row, token, new: row.at[token].add(new))(
        history.counts, token, active.astype(jnp.int32)
    )
    last = jnp.concatenate([history.last[:, 1:], token[:, None]], axis=-1)
    return replace(history, counts=counts, last=jnp.where(active[:, None], last, history.last))
