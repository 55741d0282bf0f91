"""Choosing the next token: temperature, top-k, top-p, min-p and the draw, as pure functions.

Every parameter is an array with one value a row, so rows of one batch may differ and another value
never recompiles. No filter sorts the vocabulary: each looks for its cut-off value by bisection,
one pass over the logits for each of the 32 bits of a float.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mllama_jax.shapes import Array, Bool, Float, Int

__all__ = [
    "SamplingParams",
    "apply_min_p",
    "apply_temperature",
    "apply_top_k",
    "apply_top_p",
    "first_of_largest",
    "row_keys",
    "sample",
]

NO_TOP_K = 0
NO_TOP_P = 1.0
NO_MIN_P = 0.0
GREEDY = 0.0


@struct.dataclass
class SamplingParams:
    """How each row of a batch chooses its tokens; a pytree of arrays with one value a row.

    Attributes:
        temperature: float32 (B,), 0 for the most likely token, otherwise positive.
        top_k: int32 (B,), how many of the most likely tokens stay, 0 for all.
        top_p: float32 (B,), in (0, 1], the probability that the tokens that stay add up to.
        min_p: float32 (B,), in [0, 1], the least probability, relative to the most likely token's.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]

    @classmethod
    def same(
        cls,
        batch_size: int,
        *,
        temperature: float = GREEDY,
        top_k: int = NO_TOP_K,
        top_p: float = NO_TOP_P,
        min_p: float = NO_MIN_P,
    ) -> "SamplingParams":
        """The same parameters for all rows; without arguments, greedy."""
        return cls(
            temperature=jnp.asarray(np.full(batch_size, temperature, np.float32)),
            top_k=jnp.asarray(np.full(batch_size, top_k, np.int32)),
            top_p=jnp.asarray(np.full(batch_size, top_p, np.float32)),
            min_p=jnp.asarray(np.full(batch_size, min_p, np.float32)),
        )


def row_keys(seed: int | Sequence[int] | np.ndarray, batch_size: int) -> Array:
    """One random key a row.

    With one seed for the batch, row ``i`` gets ``fold_in(key(seed), i)``. With a seed for each row,
    a row's key depends on its own seed alone: it draws the same tokens in any batch and any place.

    Raises:
        ValueError: a seed is not an integer from 0 to 2**32 - 1, or their number isn't the batch's.
    """
    single = isinstance(seed, int | np.integer)
    seeds = np.asarray([seed] if single else seed)
    if seeds.ndim != 1 or seeds.dtype.kind not in "iu" or ((seeds < 0) | (seeds >= 2**32)).any():
        raise ValueError(f"seed={seed!r}: expected one integer from 0 to 2**32 - 1, or one a row")
    if not single and len(seeds) != batch_size:
        raise ValueError(
            f"seed has {len(seeds)} values, but the batch has {batch_size} rows: give one integer, "
            "or one for each row"
        )
    keys = jax.vmap(jax.random.key)(seeds.astype(np.uint32))
    if single:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(keys[0], np.arange(batch_size))
    return keys


def sample(keys: Array, logits: Float[Array, "B W"], params: SamplingParams) -> Int[Array, " B"]:
    """Draws one token a row: temperature, then top-k, top-p and min-p, then the draw.

    Rows with temperature 0 take the first of the largest logits. A row's token depends on its own
    key, logits and parameters only.

    Args:
        keys: (B,) random keys.
        logits: (B, W), compared in float32.
        params: arrays of length B.

    Returns:
        int32 (B,), token ids.

    Source: transformers 4.54.1, generation/utils.py: _get_logits_processor (the order).
    """
    logits = logits.astype(jnp.float32)
    greedy = first_of_largest(logits)

    def draw() -> Array:
        scores = apply_temperature(logits, params.temperature)
        scores = _unless_off(apply_top_k, scores, params.top_k, NO_TOP_K)
        scores = _unless_off(apply_top_p, scores, params.top_p, NO_TOP_P)
        scores = _unless_off(apply_min_p, scores, params.min_p, NO_MIN_P)
        # The same draw as `jax.random.categorical`.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
        drawn = first_of_largest(noise + scores)
        return jnp.where(params.temperature == GREEDY, greedy, drawn)

    return jax.lax.cond(jnp.any(params.temperature != GREEDY), draw, lambda: greedy)


def first_of_largest(values: Float[Array, "... W"]) -> Int[Array, "..."]:
    """The index of the largest value, int32; of equal ones the first.

    As `jnp.argmax` in two plain reductions, which CPUs compute eighty times as fast.
    """
    largest = jnp.max(values, axis=-1, keepdims=True)
    indices = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    # The last index where nothing is equal to the largest, which is not a number then.
    return jnp.min(jnp.where(values == largest, indices, values.shape[-1] - 1), axis=-1)


def apply_temperature(
    logits: Float[Array, "B W"], temperature: Float[Array, " B"]
) -> Float[Array, "B W"]:
    """Divides by the temperature; rows with temperature 0 stay as they are.

    Source: transformers 4.54.1, generation/logits_process.py: TemperatureLogitsWarper.
    """
    return logits / jnp.where(temperature == GREEDY, 1.0, temperature)[:, None]


def apply_top_k(logits: Float[Array, "B W"], top_k: Int[Array, " B"]) -> Float[Array, "B W"]:
    """Sets to -inf what is less than the k-th largest logit; ties with it stay. 0 keeps all.

    Source: transformers 4.54.1, generation/logits_process.py: TopKLogitsWarper.
    """
    kept = jnp.where(top_k == NO_TOP_K, logits.shape[-1], jnp.minimum(top_k, logits.shape[-1]))
    order = _ordered_bits(logits)
    threshold = _largest_where(lambda t: jnp.sum(order >= t[:, None], axis=-1) >= kept, len(kept))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)


def apply_top_p(logits: Float[Array, "B W"], top_p: Float[Array, " B"]) -> Float[Array, "B W"]:
    """Sets to -inf the least likely tokens whose probabilities add up to at most 1 - top_p.

    Among equal logits at the border those with smaller ids go first; the last of the most likely
    tokens always stays. 1 keeps all.

    Source: transformers 4.54.1, generation/logits_process.py: TopPLogitsWarper.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    order = _ordered_bits(logits)
    tail = jnp.where(top_p == NO_TOP_P, -1.0, 1.0 - top_p)

    def mass_below(threshold: Array) -> Array:
        return jnp.sum(jnp.where(order < threshold[:, None], probabilities, 0.0), axis=-1)

    border = _largest_where(lambda t: mass_below(t) <= tail, len(tail))
    border = jnp.minimum(border, jnp.max(order, axis=-1))
    tied = order == border[:, None]
    rank = jnp.cumsum(tied, axis=-1)
    sum_to_here = mass_below(border)[:, None] + rank * probabilities
    last = rank == jnp.max(rank, axis=-1, keepdims=True)
    removed = (order < border[:, None]) | (tied & (sum_to_here <= tail[:, None]) & ~last)
    return jnp.where(removed, -jnp.inf, logits)


def apply_min_p(logits: Float[Array, "B W"], min_p: Float[Array, " B"]) -> Float[Array, "B W"]:
    """Sets to -inf the tokens less likely than min_p times the most likely one. 0 keeps all.

    Source: transformers 4.54.1, generation/logits_process.py: MinPLogitsWarper.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    least = min_p[:, None] * jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)


def _unless_off(
    method: Callable[[Array, Array], Array], logits: Array, values: Array, off: int | float
) -> Array:
    """The method's result, at no cost where all rows have it off."""
    return jax.lax.cond(jnp.any(values != off), method, lambda logits, _: logits, logits, values)


def _ordered_bits(values: Float[Array, "B W"]) -> Array:
    """uint32 (B, W) in the order of the float32 values, equal where they are equal."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)  # -0 equals 0
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_where(holds: Callable[[Array], Bool[Array, " B"]], batch_size: int) -> Array:
    """uint32 (B,): the largest value where a condition holds that is true up to a point."""

    def set_bit(i: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(batch_size, jnp.uint32))
