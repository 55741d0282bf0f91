"""Temperature, top-k, top-p, min-p and the draw, each row with its own parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllama_jax.generation.sampling import (
    SamplingParams,
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    first_of_largest,
    row_keys,
    sample,
)

INF = np.inf


def params(rows: list[dict[str, float]]) -> SamplingParams:
    """Each row's own parameters; what it doesn't name is off, and the temperature 1."""
    each = [SamplingParams.same(1, **{"temperature": 1.0, **row}) for row in rows]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each)


def kept(filtered: jax.Array) -> list[list[int]]:
    return [np.flatnonzero(row > -INF).tolist() for row in np.asarray(filtered)]


def test_temperature_divides_and_zero_leaves_alone():
    logits = jnp.array([[1.0, -3.0], [1.0, -3.0]])
    scaled = apply_temperature(logits, jnp.array([0.5, 0.0]))
    np.testing.assert_array_equal(scaled, [[2.0, -6.0], [1.0, -3.0]])


def test_top_k_keeps_ties_with_the_kth_and_zero_keeps_all():
    logits = jnp.tile(jnp.array([0.5, 2.0, -0.0, 0.0, 2.0, -7.0]), (6, 1))
    filtered = apply_top_k(logits, jnp.array([0, 1, 2, 3, 4, 99]))
    everything = list(range(6))
    assert kept(filtered) == [everything, [1, 4], [1, 4], [0, 1, 4], [0, 1, 2, 3, 4], everything]


def test_top_k_counts_tokens_that_are_ruled_out_already():
    filtered = apply_top_k(jnp.array([[-INF, 1.0, -INF, -2.0]]), jnp.array([3]))
    assert kept(filtered) == [[1, 3]]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    probabilities = jnp.array([0.15, 0.4, 0.05, 0.3, 0.1])
    logits = jnp.tile(jnp.log(probabilities), (5, 1))
    filtered = apply_top_p(logits, jnp.array([1.0, 0.39, 0.41, 0.8, 1e-9]))
    assert kept(filtered) == [[0, 1, 2, 3, 4], [1], [1, 3], [0, 1, 3], [1]]


def test_top_p_drops_smaller_ids_first_among_equals():
    logits = jnp.zeros((3, 4))
    filtered = apply_top_p(logits, jnp.array([0.3, 0.6, 0.9]))
    assert kept(filtered) == [[2, 3], [1, 2, 3], [0, 1, 2, 3]]


def test_min_p_is_relative_to_the_most_likely():
    logits = jnp.tile(jnp.log(jnp.array([0.15, 0.4, 0.05, 0.3, 0.1])), (4, 1))
    filtered = apply_min_p(logits, jnp.array([0.0, 0.3, 0.5, 1.0]))
    assert kept(filtered) == [[0, 1, 2, 3, 4], [0, 1, 3], [1, 3], [1]]


def test_rows_choose_by_their_own_parameters():
    rows = [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {}]
    logits = jnp.tile(jnp.array([0.0, 3.0, 2.9, 1.0]), (len(rows), 1))
    draw, options = jax.jit(sample), params(rows)
    drawn = np.array([draw(row_keys(seed, len(rows)), logits, options) for seed in range(30)])
    assert (drawn[:, :4] == 1).all()
    assert len(set(drawn[:, 4])) > 1


def test_greedy_takes_the_first_of_the_largest():
    logits = jnp.array([[1.0, 2.0, 2.0], [2.0, 2.0, -1.0]], jnp.bfloat16)
    assert sample(row_keys(0, 2), logits, SamplingParams.same(2)).tolist() == [1, 0]


def test_first_of_largest_is_numpys_argmax():
    random = np.random.default_rng(1)
    values = random.integers(0, 4, (50, 7)).astype(np.float32)
    values[:5] = -INF
    values[5:10, 2:] = -INF
    values[10, 3] = INF
    np.testing.assert_array_equal(first_of_largest(jnp.asarray(values)), values.argmax(-1))
    # What is not a number gives no index outside.
    assert 0 <= int(first_of_largest(jnp.full(7, np.nan))) < 7


def test_draws_are_those_of_jax():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(20, 50)), jnp.float32)
    keys = row_keys(3, 20)
    drawn = sample(keys, logits, params([{}] * 20))
    np.testing.assert_array_equal(drawn, jax.vmap(jax.random.categorical)(keys, logits))


def test_draws_have_the_distribution_of_what_is_kept():
    probabilities = np.array([0.02, 0.3, 0.08, 0.25, 0.2, 0.15])
    temperature, count = 0.7, 20_000
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (count, 1))
    options = SamplingParams.same(count, temperature=temperature, top_k=5, top_p=0.9, min_p=0.2)
    drawn = jax.jit(sample)(row_keys(3, count), logits, options)
    # By hand: top-k drops token 0, top-p token 2, min-p nothing.
    expected = probabilities ** (1 / temperature) * [0, 1, 0, 1, 1, 1]
    expected /= expected.sum()
    found = np.bincount(drawn, minlength=6) / count
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) <= 4 * deviation).all()


def test_one_seed_gives_rows_keys_of_their_own():
    keys = jax.random.key_data(row_keys(7, 4))
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 4
    np.testing.assert_array_equal(keys[:2], jax.random.key_data(row_keys(7, 2)))


def test_a_seed_a_row_does_not_depend_on_the_place():
    keys = jax.random.key_data(row_keys([5, 9, 5], 3))
    np.testing.assert_array_equal(keys[0], keys[2])
    np.testing.assert_array_equal(keys[1], jax.random.key_data(row_keys([9], 1))[0])


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, "seed=-1: expected one integer from 0"),
        (2**32, "expected one integer from 0"),
        (np.array([0.5, 0.5]), r"seed=array.*: expected one integer"),
        (np.array([[1, 2]]), "or one a row"),
        ([1, 2, 3], "seed has 3 values, but the batch has 2 rows"),
    ],
)
def test_unusable_seeds(seed: int | list[int] | np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        row_keys(seed, 2)
