"""The next token of every row by its own rules, against transformers and the definitions."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers.generation import logits_process as hf

from mllama_jax.batch.requests import RequestError, SamplingOptions
from mllama_jax.batch.rules import (
    BAD_WORD_LENGTH,
    BAD_WORDS,
    BIASED_TOKENS,
    STOP_TOKENS,
    RowRules,
    bad_word_tokens,
    blank_rules,
    ended_by,
    make_row_rules,
    pack_bits,
    with_guide_masks,
    with_row,
)
from mllama_jax.batch.sampling import RowHistory, apply_rules, choose, is_end, with_prompt
from mllama_jax.generation.sampling import SamplingParams, row_keys, sample

W = 70  # Two full words of bits and a piece.
ROWS = 6
ENDS = (3, 68)
IS_EOS = np.isin(np.arange(W), ENDS)
INF = np.inf

traced = []


def traced_choose(*arguments):
    traced.append(arguments)
    return choose(*arguments)


apply_rules_jit = jax.jit(apply_rules)
choose_jit = jax.jit(traced_choose)
admit = jax.jit(with_row)
read = jax.jit(with_prompt)

Options = partial(SamplingOptions, temperature=0.0, seed=11)


def logits_of(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, W)).astype(np.float32)


def rules_of(options: list[SamplingOptions], **more) -> RowRules:
    """One row each; ``more`` holds a list of values of each argument."""
    rules = blank_rules(len(options), W)
    for i, row in enumerate(options):
        own = {name: values[i] for name, values in more.items()}
        rules = admit(rules, i, make_row_rules(row, W, **own))
    return rules


def history_of(prompts: list[list[int]], answers: list[list[int]]) -> RowHistory:
    """After these tokens, which the rows are made to choose one by one."""
    history = RowHistory.blank(len(prompts), W)
    for i, prompt in enumerate(prompts):
        ids = np.array([*prompt, *[9] * (8 - len(prompt))], np.int32)
        history = read(history, i, ids, np.arange(8) < len(prompt), True)
    blank = blank_rules(len(prompts), W)
    for step in range(max(map(len, answers))):
        active = np.array([step < len(answer) for answer in answers])
        forced = np.zeros((len(answers), W), np.float32)
        for row, answer in zip(forced, answers, strict=True):
            row[answer[step] if step < len(answer) else 7] = 1
        *_, history = choose_jit(forced, blank, history, *steps(0, active), IS_EOS)
    return history


def steps(step, active) -> tuple[np.ndarray, np.ndarray]:
    active = np.asarray(active)
    return np.broadcast_to(np.int32(step), active.shape), active


def shaped(logits, rules, history=None, step=0, active=None) -> np.ndarray:
    history = RowHistory.blank(len(logits), W) if history is None else history
    active = np.ones(len(logits), bool) if active is None else active
    return np.asarray(apply_rules_jit(logits, rules, history, *steps(step, active), IS_EOS))


def chosen(logits, rules, history=None, step=0, active=None) -> tuple:
    history = RowHistory.blank(len(logits), W) if history is None else history
    active = np.ones(len(logits), bool) if active is None else active
    return choose_jit(logits, rules, history, *steps(step, active), IS_EOS)


def processed(logits, texts, processors) -> np.ndarray:
    """What transformers' processors, one list a row, make of the logits."""
    rows = []
    for row, text, steps in zip(logits, texts, processors, strict=True):
        scores = torch.tensor(row)[None]
        for processor in steps:
            scores = processor(torch.tensor([text]), scores.clone())
        rows.append(scores[0].numpy())
    return np.stack(rows)


PROMPTS = [[1, 2, 5], [5, 5, 64], [8], [2, 40], [33, 34, 35, 1], [60]]
ANSWERS = [[2, 2, 9], [64, 1, 64], [8, 8, 8], [7, 6, 5], [33, 30, 31], [1, 2, 1]]
TEXTS = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]


@pytest.fixture(scope="module")
def history():
    return history_of(PROMPTS, ANSWERS)


def test_history_holds_the_prompt_and_counts_the_answer():
    history = history_of([[1, 1], [2], [5], [], [], []], [[4, 4, 6], [4], [], [], [], []])
    seen = [np.flatnonzero(row).tolist() for row in np.asarray(history.in_prompt)]
    assert seen == [[1], [2], [5], [], [], []]
    counts = np.zeros((ROWS, W), int)
    counts[0, 4], counts[0, 6], counts[1, 4] = 2, 1, 1
    np.testing.assert_array_equal(history.counts, counts)
    last = np.asarray(history.last)[:, -4:].tolist()
    assert last == [[-1, 4, 4, 6], [-1, -1, -1, 4], *[[-1] * 4] * 4]


def test_a_prompt_comes_in_pieces_and_the_next_one_starts_afresh(history):
    before = jax.tree.map(np.asarray, history)
    ids, all_of_it = np.array([4, W, W + 8, 10] * 2, np.int32), np.ones(8, bool)
    first = read(history, 1, ids, all_of_it, True)
    assert np.flatnonzero(first.in_prompt[1]).tolist() == [4, 10]  # Image tokens have no logit.
    assert first.counts[1].sum() == 0
    assert (first.last[1] == -1).all()
    second = read(first, 1, ids + 1, all_of_it, False)
    assert np.flatnonzero(second.in_prompt[1]).tolist() == [4, 5, 10, 11]
    others = np.array([0, 2, 3, 4, 5])
    for new, old in zip(jax.tree.leaves(second), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(new[others], old[others])


def test_repetition_penalty(history):
    values = [1.3, 1.0, 0.7, 2.0, 5.0, 1.01]
    rules = rules_of([Options(repetition_penalty=value) for value in values])
    processors = [[hf.RepetitionPenaltyLogitsProcessor(value)] for value in values]
    logits = logits_of(0)
    expected = processed(logits, TEXTS, processors)
    np.testing.assert_allclose(shaped(logits, rules, history), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        [(0.5, 0.0), (0.0, 0.7), (-1.5, 2.0), (0.0, 0.0), (2.0, 2.0), (0.1, -0.3)],
        [(0.5, 0.0), (-2.0, 0.0), *[(0.0, 0.0)] * 4],
        [(0.0, 0.5), (0.0, -2.0), *[(0.0, 0.0)] * 4],
    ],
    ids=["both", "presence", "frequency"],
)
def test_presence_and_frequency_penalties(history, values):
    rules = rules_of([Options(presence_penalty=p, frequency_penalty=f) for p, f in values])
    logits = logits_of(1)
    counts = np.stack([np.bincount(answer, minlength=W) for answer in ANSWERS])
    presence, frequency = np.array(values, np.float32).T[..., None]
    expected = logits - counts * frequency - (counts > 0) * presence
    np.testing.assert_allclose(shaped(logits, rules, history), expected, rtol=1e-6)


def test_bias():
    bias = [{5: 2.5}, {}, {0: -100.0, 69: 100.0, 33: 0.25}, {}, {W - 1: 1.0}, {1: 3.0, 2: 4.0}]
    rules = rules_of([Options(logit_bias=row) for row in bias])
    logits = logits_of(2)
    processors = [
        [hf.SequenceBiasLogitsProcessor({(id,): value for id, value in row.items()})] if row else []
        for row in bias
    ]
    np.testing.assert_allclose(
        shaped(logits, rules), processed(logits, TEXTS, processors), rtol=1e-6
    )


def test_bad_words_of_one_and_more_tokens(history):
    # Each row's answer ends in the start of some of its words, but not of others.
    words = [
        [[2, 9, 4], [9, 5], [2, 4], [9, 2, 6]],
        [[7]],
        [[8, 8, 8, 8], [8, 8, 8, 8, 1], [6, 8, 2]],
        [],
        [[31, 0], [30, 31, 1], [30, 2], [5], [1, 33, 30, 31, 12]],
        [[1, 2, 1, 69], [60, 1, 2, 1, 3]],
    ]
    rules = rules_of([Options()] * ROWS, bad_words=words)
    logits = logits_of(3)
    # transformers passes over words that are longer than the text: here it has one token more.
    expected = processed(
        logits,
        [[20, *answer] for answer in ANSWERS],
        [[hf.NoBadWordsLogitsProcessor(row)] if row else [] for row in words],
    )
    found = shaped(logits, rules, history)
    np.testing.assert_array_equal(found, expected)
    forbidden = [np.flatnonzero(row == -INF).tolist() for row in found]
    assert forbidden == [[4, 5], [7], [8], [], [0, 1, 5], [69]]


def test_no_end_or_stop_token_before_min_tokens():
    options = [
        Options(min_tokens=3),
        Options(min_tokens=2),
        Options(min_tokens=3, stop_token_ids=(0, 9)),
        Options(stop_token_ids=(0, 9)),
        Options(min_tokens=3, ignore_eos=True, stop_token_ids=(5,)),
        Options(min_tokens=9, ignore_eos=True),
    ]
    ends = [ENDS, (), (*ENDS, 0, 9), (), (5,), ()]
    logits = logits_of(4)
    # transformers counts from the prompt's length on: here it is 0.
    expected = processed(
        logits,
        [[1, 1]] * ROWS,
        [
            [hf.MinNewTokensLengthLogitsProcessor(0, 3, list(row), device="cpu")] if row else []
            for row in ends
        ],
    )
    np.testing.assert_array_equal(shaped(logits, rules_of(options), step=2), expected)


def test_allowed_tokens_and_the_guides_mask():
    allowed = [(0, 31, 32, 69), None, None, (5, 6, 7, 64), None, tuple(range(W))]
    guide = [None, (1, 2, 63, 64, 69), None, (6, 7, 8), None, None]
    masks = [None if g is None else pack_bits(np.isin(np.arange(W), g)) for g in guide]
    rules = rules_of([Options(allowed_token_ids=a) for a in allowed], guide_mask=masks)
    logits = logits_of(5)
    everything = set(range(W))
    kept = [
        everything & set(everything if a is None else a) & set(everything if g is None else g)
        for a, g in zip(allowed, guide, strict=True)
    ]
    processors = [[hf.SuppressTokensLogitsProcessor(sorted(everything - row))] for row in kept]
    expected = processed(logits, TEXTS, processors)
    np.testing.assert_array_equal(shaped(logits, rules), expected)


def test_new_guide_masks_reach_the_rows_that_are_named():
    first, second = (pack_bits(np.isin(np.arange(W), ids)) for ids in ([1, 2], [69]))
    rules = rules_of([Options()] * ROWS, guide_mask=[first, first, None, None, first, first])
    rows = np.array([False, True, True, False, True, False])
    rules = jax.jit(with_guide_masks)(rules, np.stack([second] * ROWS), rows)
    kept = [np.flatnonzero(row > -INF).tolist() for row in shaped(logits_of(6), rules)]
    everything = list(range(W))
    assert kept == [[1, 2], [69], everything, everything, [69], [1, 2]]


def test_rules_come_in_this_order(history):
    """Masks, bias, repetition and then the other penalties, which do not commute."""
    bias, banned = {2: 4.0, 9: -6.0, 1: 1.0}, [[9, 7]]
    option = Options(
        allowed_token_ids=tuple(range(60)),
        min_tokens=5,
        logit_bias=bias,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    rules = rules_of([option] * ROWS, bad_words=[banned] * ROWS)
    logits = logits_of(7)
    processors = [
        hf.SuppressTokensLogitsProcessor(list(range(60, W))),
        hf.NoBadWordsLogitsProcessor(banned),
        hf.SuppressTokensLogitsProcessor(list(ENDS)),
        hf.SequenceBiasLogitsProcessor({(id,): value for id, value in bias.items()}),
        hf.RepetitionPenaltyLogitsProcessor(1.5),
    ]
    counts = np.stack([np.bincount(answer, minlength=W) for answer in ANSWERS])
    expected = processed(logits, TEXTS, [processors] * ROWS)
    expected = expected - 0.5 * counts - 0.25 * (counts > 0)
    np.testing.assert_allclose(shaped(logits, rules, history, step=4), expected, rtol=1e-6)
    assert (expected[:, 7] == -INF).tolist() == [True, False, False, False, False, False]


def test_draws_have_the_distribution_of_transformers():
    """The rows of one batch, each kind with its own temperature and filters."""
    kinds = [
        {"temperature": 0.7},
        {"temperature": 1.6, "top_k": 9},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1.4, "min_p": 0.15},
        {"temperature": 2.0, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "repetition_penalty": 1.8, "logit_bias": {4: 2.0}, "top_k": 20},
    ]
    warpers = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    each, rounds = 32, 100
    logits = np.random.default_rng(8).normal(0, 1.5, W).astype(np.float32)
    options = [Options(**kind) for kind in kinds for _ in range(each)]
    batch = np.tile(logits, (len(options), 1))
    rules = rules_of(options, choice=list(range(each)) * len(kinds))
    prompt = [int(i) for i in np.argsort(-logits)[:4]]
    history = RowHistory.blank(len(options), W)
    history = history.replace(in_prompt=history.in_prompt.at[:, prompt].set(True))
    drawn = np.stack([chosen(batch, rules, history, step)[0] for step in range(rounds)])
    for i, kind in enumerate(kinds):
        steps = [warpers[name](kind[name]) for name in warpers if name in kind]
        start = logits + np.where(np.arange(W) == 4, 2.0, 0.0) * ("logit_bias" in kind)
        scores = processed([start], [prompt], [steps])[0]
        weights = np.exp(scores - scores.max())
        expected = weights / weights.sum() * each * rounds
        found = np.bincount(drawn[:, i * each : (i + 1) * each].ravel(), minlength=W)
        assert found[expected == 0].sum() == 0, kind
        # Where few are expected, tokens are counted together.
        rare = (expected < 5) & (expected > 0)
        groups = [
            np.append(values[expected >= 5], values[rare].sum()) for values in (found, expected)
        ]
        groups = [values[groups[1] > 0] for values in groups]
        assert chisquare(*groups).pvalue > 1e-3, kind


MIXED = [
    {"temperature": 1.3, "seed": 5, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 3},
    {"temperature": 1.0, "seed": 5, "logit_bias": {7: 3.0}, "presence_penalty": 1.0},
    {"temperature": 0.8, "seed": 77, "top_k": 12, "min_p": 0.02, "logprobs": 0},
    {"temperature": 2.0, "seed": 6, "allowed_token_ids": tuple(range(0, W, 3)), "min_tokens": 4},
    {"temperature": 1.0, "seed": 123456789012, "frequency_penalty": 1.5, "stop_token_ids": (9,)},
]


def texts_of(order: list[int | None], logits: np.ndarray, steps: int = 12) -> dict[int, list]:
    """Tokens and log-probabilities of the mixed requests, each in the slot of its number.

    None stands for a slot that no request has taken.
    """
    rules = blank_rules(len(order), W)
    history = RowHistory.blank(len(order), W)
    active = np.array([i is not None for i in order])
    for slot, i in enumerate(order):
        if i is not None:
            row = make_row_rules(Options(**MIXED[i]), W, bad_words=[[1, 2], [4]])
            rules = admit(rules, slot, row)
            history = read(
                history, slot, np.array(PROMPTS[i] * 4, np.int32)[:4], np.ones(4, bool), True
            )
    found: dict[int, list] = {i: [] for i in order if i is not None}
    for step in range(steps):
        rows = np.stack([logits[0 if i is None else i, step] for i in order])
        token, logprob, top_tokens, top_logprobs, history = chosen(
            rows, rules, history, step, active
        )
        for slot, i in enumerate(order):
            if i is not None:
                num_logprobs = MIXED[i].get("logprobs", -1)
                told = (*top_tokens[slot, :num_logprobs], *top_logprobs[slot, :num_logprobs])
                told = (logprob[slot], *told) if num_logprobs >= 0 else ()
                found[i].append((int(token[slot]), *map(float, told)))
    return found


def test_a_row_is_the_same_alone_among_others_and_in_another_slot():
    logits = np.random.default_rng(9).normal(0, 2, (ROWS, 12, W)).astype(np.float32)
    together = texts_of([0, 1, 2, 3, 4, 5], logits)
    assert texts_of([5, 4, 3, 2, 1, 0], logits) == together
    for i in range(ROWS):
        alone: list[int | None] = [None] * ROWS
        alone[(i + 2) % ROWS] = i
        assert texts_of(alone, logits) == {i: together[i]}
        assert texts_of([i], logits) == {i: together[i]}


def test_draws_are_those_of_generate_for_the_same_seed():
    choices = [0, 1, 2, 3, 4, 1]
    rules = rules_of([Options(temperature=1.0, seed=7)] * ROWS, choice=choices)
    logits = np.tile(logits_of(10, 1) / 4, (ROWS, 1))
    for step in range(6):
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys(7, ROWS), step)
        expected = jax.jit(sample)(keys, logits, SamplingParams.same(ROWS, temperature=1.0))
        np.testing.assert_array_equal(
            chosen(logits, rules, step=step)[0], expected[np.array(choices)]
        )


def test_seeds():
    def seeds(**arguments) -> int:
        options = SamplingOptions(seed=arguments.pop("seed", None))
        return int(make_row_rules(options, W, **arguments).seed[0])

    assert seeds(seed=5) == seeds(seed=5, default_seed=9) == seeds(default_seed=5) == 5
    assert len({seeds() for _ in range(5)}) > 1
    large = [5, -5, 2**32 - 1, 2**32, 2**33, -(2**33), 2**32 + 5, 2**63 - 1, -(2**63)]
    assert len({seeds(seed=seed) for seed in large}) == len(large)
    assert seeds(seed=2**40) == seeds(seed=2**40)


def test_logprobs_are_those_of_the_untouched_logits():
    logits = logits_of(11)
    options = [
        Options(logprobs=5, allowed_token_ids=(8,), repetition_penalty=3.0),
        Options(logprobs=0, temperature=1.0, logit_bias={5: 50.0}),
        *[Options()] * 4,
    ]
    token, logprob, top_tokens, top_logprobs, _ = chosen(logits, rules_of(options))
    assert token[:2].tolist() == [8, 5]
    expected = torch.log_softmax(torch.tensor(logits), -1)
    values, ids = expected.topk(20)
    np.testing.assert_allclose(logprob[:2], expected[[0, 1], [8, 5]], rtol=1e-5)
    np.testing.assert_array_equal(top_tokens[0], ids[0])
    np.testing.assert_allclose(top_logprobs[0], values[0], rtol=1e-5)


def test_one_most_likely_token_is_told():
    logits = logits_of(12)
    _, logprob, top_tokens, top_logprobs, _ = chosen(
        logits, rules_of([Options(logprobs=1), *[Options()] * 5])
    )
    assert top_tokens[0, 0] == logits[0].argmax()
    assert top_logprobs[0, 0] == logprob[0] < 0


def test_logprobs_that_no_active_row_wants_are_left_out():
    logits = logits_of(12)
    rules = rules_of([Options(logprobs=0), Options(logprobs=5), *[Options()] * 4])
    active = np.array([True, False, True, True, True, True])
    _, logprob, top_tokens, top_logprobs, _ = chosen(logits, rules, active=active)
    assert logprob[0] != 0
    assert not top_tokens.any()
    assert not top_logprobs.any()
    active[0] = False
    assert not chosen(logits, rules, active=active)[1].any()


def test_rows_that_are_not_active_neither_draw_nor_learn():
    logits = np.zeros((ROWS, W), np.float32)
    rules = rules_of([Options(temperature=1.0, logit_bias={9: 5.0})] * ROWS)
    token, *_, history = chosen(logits, rules, active=np.zeros(ROWS, bool))
    assert token.tolist() == [0] * ROWS
    assert history.counts.sum() == 0
    assert (history.last == -1).all()


def test_a_row_without_any_token_left_gets_the_first_end_token():
    nothing = np.zeros(-(-W // 32), np.uint32)
    options = [
        Options(),
        Options(temperature=1.0),
        Options(temperature=1.0, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=2.0),
        Options(allowed_token_ids=(5,), temperature=1.0),
        Options(allowed_token_ids=(3, 68), min_tokens=2, logprobs=20),
        Options(),
    ]
    rules = rules_of(
        options,
        guide_mask=[nothing, nothing, nothing, None, None, None],
        bad_words=[(), (), (), [[5]], (), ()],
    )
    logits = logits_of(13)
    with jax.debug_nans(True):
        token, logprob, *_ = chosen(logits, rules)
    assert token.tolist() == [ENDS[0]] * 5 + [int(logits[5].argmax())]
    assert np.isfinite(logprob).all()


def test_almost_no_temperature_is_greedy():
    options = SamplingOptions(temperature=1e-6, top_k=5, top_p=0.5, min_p=0.5)
    sampling = make_row_rules(options, W).sampling
    assert jax.tree.leaves(sampling) == jax.tree.leaves(SamplingParams.same(1))
    assert make_row_rules(SamplingOptions(temperature=0.01), W).sampling.temperature > 0


def test_is_end_and_what_ended():
    options = [
        Options(),
        Options(ignore_eos=True),
        Options(stop_token_ids=(9, 0)),
        Options(ignore_eos=True, stop_token_ids=(3,)),
        Options(stop_token_ids=(3,)),
    ]
    expected = {
        3: [(True, None), (False, None), (True, None), (True, 3), (True, None)],
        9: [(False, None), (False, None), (True, 9), (False, None), (False, None)],
        0: [(False, None), (False, None), (True, 0), (False, None), (False, None)],
        68: [(True, None), (False, None), (True, None), (False, None), (True, None)],
        1: [(False, None)] * 5,
    }
    rules = rules_of(options)
    for token, ends in expected.items():
        found = is_end(np.full(len(options), token), rules, IS_EOS)
        assert found.tolist() == [ended for ended, _ in ends]
        assert [ended_by(token, option, ENDS) for option in options] == ends


def random_request(random: np.random.Generator) -> tuple[SamplingOptions, dict]:
    def maybe(value, otherwise):
        return value if random.random() < 0.4 else otherwise

    def ids(most: int) -> tuple[int, ...]:
        return tuple(random.choice(W, random.integers(1, most), replace=False).tolist())

    options = SamplingOptions(
        temperature=maybe(0.0, random.uniform(0.1, 3)),
        top_k=maybe(int(random.integers(1, 90)), 0),
        top_p=maybe(random.uniform(0.01, 1), 1.0),
        min_p=maybe(random.uniform(0, 1), 0.0),
        min_tokens=maybe(int(random.integers(0, 6)), 0),
        presence_penalty=maybe(random.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(random.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(random.uniform(0.5, 2), 1.0),
        stop_token_ids=maybe(ids(STOP_TOKENS), ()),
        ignore_eos=bool(random.random() < 0.3),
        seed=maybe(int(random.integers(2**32)), None),
        logprobs=maybe(int(random.integers(0, 21)), None),
        logit_bias=maybe({id: random.uniform(-100, 100) for id in ids(20)}, {}),
        allowed_token_ids=maybe(ids(W), None),
    )
    words = maybe([random.integers(0, W, random.integers(1, 4)).tolist() for _ in range(40)], [])
    guide = maybe(pack_bits(random.random(W) < 0.5), None)
    return options, {"bad_words": words, "guide_mask": guide}


def forbidden(options, more, answer: list[int]) -> np.ndarray:
    """bool (W,), by the words of the options."""
    ids = np.arange(W)
    result = np.zeros(W, bool)
    if options.allowed_token_ids is not None:
        result |= ~np.isin(ids, options.allowed_token_ids)
    if more["guide_mask"] is not None:
        result |= (more["guide_mask"][ids // 32] >> (ids % 32).astype(np.uint32) & 1) == 0
    if len(answer) < options.min_tokens:
        result |= np.isin(ids, options.stop_token_ids)
        result |= IS_EOS & (not options.ignore_eos)
    for word in more["bad_words"]:
        result[word[-1]] |= answer[len(answer) - len(word) + 1 :] == word[:-1]
    return result


def test_no_forbidden_token_is_ever_chosen():
    random = np.random.default_rng(14)
    for _ in range(50):
        requests = [random_request(random) for _ in range(ROWS)]
        rules = blank_rules(ROWS, W)
        for slot, (options, more) in enumerate(requests):
            rules = admit(rules, slot, make_row_rules(options, W, **more))
        history = RowHistory.blank(ROWS, W)
        answers: list[list[int]] = [[] for _ in range(ROWS)]
        for step in range(8):
            token, logprob, *_, history = chosen(
                random.normal(0, 3, (ROWS, W)).astype(np.float32), rules, history, step
            )
            assert np.isfinite(logprob).all()
            for answer, id, (options, more) in zip(answers, token.tolist(), requests, strict=True):
                out = forbidden(options, more, answer)
                assert id == ENDS[0] if out.all() else not out[id]
                answer.append(id)


def test_no_request_compiles_anything():
    random = np.random.default_rng(15)
    rules, history = rules_of([Options()] * ROWS), RowHistory.blank(ROWS, W)
    *_, history = chosen(logits_of(15), rules, history)
    before = len(traced)
    for slot in range(ROWS):
        options, more = random_request(random)
        rules = admit(rules, slot, make_row_rules(options, W, **more))
        *_, history = chosen(logits_of(slot), rules, history, slot)
    assert len(traced) == before


def test_a_row_of_rules_goes_to_its_slot_only():
    random = np.random.default_rng(16)
    before = rules_of([random_request(random)[0] for _ in range(ROWS)])
    options, more = random_request(random)
    row = make_row_rules(options, W, **more)
    after = admit(before, 4, row)
    rest = np.array([0, 1, 2, 3, 5])
    for new, old, own in zip(*map(jax.tree.leaves, (after, before, row)), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        np.testing.assert_array_equal(new[4:5], own)
        np.testing.assert_array_equal(new[rest], old[rest])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stop_token_ids", tuple(range(33)), "stop_token_ids has 33 tokens; there is room for 32"),
        ("stop_token_ids", (5, W, -1), "stop_token_ids has -1, 70; the model's tokens are 0 to 69"),
        ("logit_bias", {W: 1.0}, "logit_bias has 70"),
        ("allowed_token_ids", tuple(range(90)), "allowed_token_ids has 70, 71, 72, 73, 74 …;"),
        ("allowed_token_ids", (), "allowed_token_ids is empty"),
    ],
)
def test_what_does_not_fit_is_refused(field, value, message):
    with pytest.raises(RequestError, match=message) as caught:
        make_row_rules(SamplingOptions(**{field: value}), W)
    assert (caught.value.field, caught.value.status_code) == (field, 400)


def test_bad_words_and_biases_that_do_not_fit_are_refused():
    pairs = [[i, j] for i in range(W) for j in range(2)]
    for words in (pairs[: BAD_WORDS + 1], [list(range(BAD_WORD_LENGTH + 1))]):
        with pytest.raises(RequestError, match="there is room for 128 of 16 tokens") as caught:
            make_row_rules(Options(), W, bad_words=words)
        assert caught.value.field == "bad_words"
    most = [*pairs[:BAD_WORDS], *[[i] for i in range(W - 1)], list(range(BAD_WORD_LENGTH))[:16]]
    make_row_rules(Options(), W, bad_words=[word for word in most if len(word) != 2])
    make_row_rules(Options(), W, bad_words=pairs[:BAD_WORDS])
    large = dict.fromkeys(range(BIASED_TOKENS + 1), 1.0)
    with pytest.raises(RequestError, match="logit_bias has 1025 tokens; there is room for 1024"):
        make_row_rules(Options(logit_bias=large), 128256)


def test_bad_words_are_spelled_alone_and_after_a_space(processor):
    tokenizer = processor.tokenizer
    found = bad_word_tokens(["New York", " tea", "tea", "<|eot_id|>"], tokenizer)
    texts = [tokenizer.decode(ids) for ids in found]
    assert texts == ["New York", " New York", "tea", " tea", "<|eot_id|>", " <|eot_id|>"]
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in {id for ids in found for id in ids}
