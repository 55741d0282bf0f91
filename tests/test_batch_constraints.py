"""Rules of requests all the way through the engine, beside neighbours that have none."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import LOADED, PROCESSOR, answers, ask, make_engine, tokens

from mllama_jax.batch.answers import Answer, Failure
from mllama_jax.batch.engine import Engine
from mllama_jax.batch.guided import Guide
from mllama_jax.batch.requests import Request, RequestError

NEW = 10
PLAIN = ask("plain", "Which digit is this?", max_tokens=NEW, ignore_eos=True)
TOKENIZER = PROCESSOR.tokenizer
Rule = Callable[[np.ndarray, list[int], list[int]], np.ndarray]


@cache
def forward() -> Callable[[np.ndarray], np.ndarray]:
    model, params = LOADED
    return jax.jit(lambda ids: model.apply({"params": params}, input_ids=ids).logits[0])


def greedy(prompt: list[int], rule: Rule) -> list[int]:
    """New tokens by the definition: everything is computed anew for each, and a rule changes the
    logits."""
    new: list[int] = []
    while len(new) < NEW:
        ids = np.zeros((1, 64), np.int32)
        ids[0, : len(prompt) + len(new)] = [*prompt, *new]
        logits = np.asarray(forward()(jnp.asarray(ids))[len(prompt) + len(new) - 1])
        new.append(int(np.argmax(rule(logits.copy(), prompt, new))))
    return new


def biased(logits: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
    logits[[70, 71]] += [40.0, 40.5]
    return logits


def restricted(logits: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
    allowed = np.full(len(logits), -np.inf)
    allowed[[65, 66, 67]] = logits[[65, 66, 67]]
    return allowed


def penalised(logits: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
    counts = np.bincount(new, minlength=len(logits))
    return logits - 15.0 * counts - 20.0 * (counts > 0)


def repeating(logits: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
    for token in {*prompt, *new}:
        if token < len(logits):
            logits[token] *= 4.0 if logits[token] < 0 else 0.25
    return logits


def unchanged(logits: np.ndarray, prompt: list[int], new: list[int]) -> np.ndarray:
    return logits


def small_engine() -> Engine:
    """Needs few programs."""
    return make_engine(prompt_lengths=(32,))


def free(count: int, *, seed: int) -> list[Request]:
    """Requests without rules, every second with a picture."""
    random = np.random.default_rng(seed)
    return [
        ask(f"{i}", "Which digit is this?", *[i] * (i % 2), max_tokens=int(random.integers(1, 14)))
        for i in range(count)
    ]


RULES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "none": (unchanged, {}),
    "bias": (biased, {"logit_bias": {70: 40.0, 71: 40.5}}),
    "allowed": (restricted, {"allowed_token_ids": (65, 66, 67)}),
    "penalties": (penalised, {"frequency_penalty": 15.0, "presence_penalty": 20.0}),
    "repetition": (repeating, {"repetition_penalty": 4.0}),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Answer]:
    """All at once, with others between them, in three slots."""
    rows = [
        replace(PLAIN, custom_id=name, options=replace(PLAIN.options, **options))
        for name, (_, options) in RULES.items()
    ]
    others = free(len(rows), seed=6)
    return answers(small_engine(), [r for pair in zip(rows, others, strict=True) for r in pair])


@pytest.mark.parametrize("name", RULES)
def test_logits_are_changed_as_defined(found: dict[str, Answer], name: str):
    rule, _ = RULES[name]
    answer = found[name]
    expected = greedy(answer.prepared.input_ids.tolist(), rule)
    assert list(tokens(answer)) == expected
    assert name == "none" or tokens(answer) != tokens(found["none"])


def test_neighbours_do_not_notice(found: dict[str, Answer]):
    requests = free(len(RULES), seed=6)
    alone = answers(small_engine(), requests)
    for request in requests:
        assert tokens(found[request.custom_id]) == tokens(alone[request.custom_id])


def test_bad_words_do_not_come_up(found: dict[str, Answer]):
    text = found["none"].choices[0].text
    words = text.split()
    assert len(words) > 2
    # One of several tokens, and one of a single one.
    one = next(w for w in words if len(TOKENIZER.encode(f" {w}", add_special_tokens=False)) == 1)
    two = " ".join(words[1:3])
    for word in (one, two):
        options = replace(PLAIN.options, bad_words=(word,))
        [answer] = small_engine().run([replace(PLAIN, options=options)])
        assert isinstance(answer, Answer)
        assert f" {word}" in f" {text}"
        assert word not in answer.choices[0].text
        assert len(tokens(answer)) == NEW


SCHEMA = {
    "type": "object",
    "properties": {"digit": {"enum": [1, 2, 3]}, "sure": {"type": "boolean"}},
    "required": ["digit", "sure"],
    "additionalProperties": False,
}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def test_answers_keep_to_their_schema_beside_free_ones():
    words = range(LOADED[0].text_config.vocab_size)
    space = {id: -100.0 for id in words if not TOKENIZER.decode(id).strip()}
    asked = [
        ask(
            f"guided {i}",
            "Which digit is this?",
            i,
            response_format=form(SCHEMA),
            logit_bias=space,
            max_tokens=60,
            temperature=i % 2,
            n=1 + i,
        )
        for i in range(3)
    ]
    others = free(4, seed=9)
    result = answers(small_engine(), [asked[0], others[0], asked[1], *others[1:], asked[2]])
    for request in asked:
        answer = result[request.custom_id]
        assert len(answer.choices) == request.options.n
        for choice in answer.choices:
            value = json.loads(choice.text)
            assert choice.finish_reason == "stop"
            assert value.keys() == {"digit", "sure"}
            assert value["digit"] in (1, 2, 3)
            assert type(value["sure"]) is bool
    alone = answers(small_engine(), others)
    for name, answer in alone.items():
        assert tokens(result[name]) == tokens(answer)


def test_a_form_that_can_not_be_kept_to_fails_alone(capfd: pytest.CaptureFixture):
    """Some patterns are too much for the library only once there is some text."""
    pattern = r"^(a|b|ab|ba|.*a.{100}b.*){1,200}$"
    letters = {id: 90.0 for text in ("a", "b", '"') for id in TOKENIZER.encode(text)}
    bad = ask(
        "bad",
        "Say it.",
        response_format=form({"type": "string", "pattern": pattern}),
        logit_bias=letters,
        max_tokens=60,
        n=2,
    )
    good = ask("good", "Which digit is this?", 2, response_format=form({"enum": ["one", "two"]}))
    engine = small_engine()
    result = answers(engine, [bad, good, *free(3, seed=5)])
    assert isinstance(result["bad"], Failure)
    assert "the answer could not be kept to its form: lexer error" in str(result["bad"].error)
    assert result["bad"].error.status_code == 500
    assert json.loads(result["good"].choices[0].text) in ("one", "two")
    assert (engine.stats.done, engine.stats.failed, engine.stats.slots_busy) == (4, 1, 0)


@pytest.mark.parametrize("call", range(5))
def test_a_guide_may_give_up_at_any_time(call: int, monkeypatch: pytest.MonkeyPatch):
    calls = 0
    mask = Guide.mask

    def failing(self: Guide) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise RequestError("it gave up", status_code=500)
        return mask(self)

    monkeypatch.setattr(Guide, "mask", failing)
    guided = ask("guided", "Say it.", response_format={"type": "json_object"}, n=2)
    engine = small_engine()
    result = answers(engine, [guided, ask("free", "Which digit is this?", 2)])
    assert str(result["guided"].error) == "it gave up"
    assert isinstance(result["free"], Answer)
    assert (engine.stats.done, engine.stats.failed) == (1, 1)
