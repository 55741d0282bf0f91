"""The engine on the example model: what requests get, whoever their neighbours are."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from asking import (
    GREEDY,
    LOADED,
    OPTIONS,
    PROCESSOR,
    answers,
    ask,
    make_engine,
    mixed,
    tokens,
    whole_messages,
)
from PIL import Image

from mllama_jax.batch.answers import Answer, Failure
from mllama_jax.batch.engine import Engine
from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.prepare import prepare
from mllama_jax.batch.requests import Request, SamplingOptions


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The programs that were compiled during the test."""
    names: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_after_the_warm_up(compiled: list[str]):
    engine = make_engine()
    engine.warm_up()
    programs = engine.stats.programs
    # Two lengths of prompts and further chunks, and decoding, each with and without pictures; the
    # encoder, its result's way into a slot, the first token, and a prompt's way to another slot.
    assert programs == 2 * (2 + 1 + 1) + 1 + 1 + 1 + 1
    compiled.clear()
    answers(engine, mixed(20, seed=2) + mixed(6, seed=3, temperature=0.7, n=2, logprobs=3))
    assert compiled == []
    assert engine.stats.programs == programs


def test_the_host_fetches_once_for_each_dispatch(monkeypatch: pytest.MonkeyPatch):
    """However many tokens come of it. Fetches are counted where all ways to do it end: on a CPU
    there is no transfer that the guard could see."""
    engine = make_engine(decode_steps=16)
    fetched, dispatched = [], []

    def count(name: str) -> None:
        program = getattr(engine._device, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            chunk = program(*args, **kwargs)
            if chunk is not None:
                dispatched.append(name)
            return chunk

        monkeypatch.setattr(engine._device, name, counted)

    for name in ("prefill", "copy_prompt", "decode"):
        count(name)
    array = type(jnp.zeros(1))
    value = array._value
    monkeypatch.setattr(array, "_value", property(lambda x: (fetched.append(x), value.fget(x))[1]))
    for module, name in ((np, "asarray"), (np, "array")):
        convert = getattr(module, name)

        def counted(x: Any, *args: Any, convert: Any = convert, **kwargs: Any) -> Any:
            if isinstance(x, array):
                fetched.append(x)
            return convert(x, *args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    requests = [
        replace(r, options=replace(r.options, max_tokens=34, ignore_eos=True))
        for r in mixed(6, seed=7)
    ]
    requests[0] = replace(requests[0], options=replace(requests[0].options, n=2, temperature=1.0))
    with jax.transfer_guard_device_to_host("disallow"):  # all that is not explicit
        found = list(engine.run(requests))
    assert len(found) == 6
    assert engine.stats.tokens_out == 7 * 34
    assert len(fetched) == len(dispatched)
    # A prompt each, and three times sixteen steps for those that start together.
    assert len(dispatched) < engine.stats.tokens_out / 8


@pytest.mark.parametrize("seed", [1, 5])
def test_a_slot_that_ends_is_filled_at_once(seed: int, monkeypatch: pytest.MonkeyPatch):
    """The device stops for a third answer, and goes on to the end when nobody waits."""
    engine, steps = make_engine(num_slots=2, decode_steps=16), []
    decode = engine._device.decode

    def noted(*args: Any, **kwargs: Any) -> Any:
        chunk = decode(*args, **kwargs)
        steps.append(int(chunk.packed[:, -2].max()))
        return chunk

    monkeypatch.setattr(engine._device, "decode", noted)
    sampled = {"n": 3, "temperature": 2.5, "seed": seed, "max_tokens": 14}
    answer = answers(engine, [ask("three", "Which digit is this?", 0, **sampled)])["three"]
    # Prompts gave the first tokens.
    *both, third = (len(choice.token_ids) - 1 for choice in answer.choices)
    assert min(both) != max(both) != third
    assert steps == [min(both), max(max(both) - min(both), third)]


def test_sampled_text_depends_on_the_seed_alone():
    requests = [
        replace(r, options=replace(r.options, temperature=1.5, seed=i % 3, max_tokens=10))
        for i, r in enumerate(mixed(6, seed=4))
    ]
    first = answers(make_engine(), requests)
    second = answers(make_engine(num_slots=2, decode_steps=7), requests[::-1])
    for name, answer in first.items():
        assert tokens(answer) == tokens(second[name])
    other = [replace(r, options=replace(r.options, seed=99)) for r in requests]
    changed = answers(make_engine(), other)
    assert any(tokens(answer) != tokens(first[name]) for name, answer in changed.items())
    # The draws are those of `generate`.
    request = requests[0]
    inputs = PROCESSOR.apply_chat_template(
        whole_messages(request),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )
    model, params = LOADED
    sampling = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 10}
    drawn = model.generate(params, **inputs, **sampling, seed=request.options.seed)
    assert tokens(first[request.custom_id]) == tuple(drawn.new_tokens[0].tolist())


def test_pictures_are_encoded_once():
    engine = make_engine()
    requests = [ask(str(i), "Which digit is this?", i % 3, (i + 1) % 3) for i in range(9)]
    answers(engine, requests)
    assert (engine.stats.pictures_encoded, engine.stats.pictures_reused) == (3, 15)
    answers(engine, requests)
    assert engine.stats.pictures_encoded == 3


def test_missing_tiles_are_computed_once(tmp_path: Path):
    """Where nothing tells them apart, as in released checkpoints."""
    model, params = LOADED
    config = model.config.vision_config
    vision = dict(params["vision_model"])
    for module, name in (
        ("gated_positional_embedding", "tile_embedding"),
        ("pre_tile_positional_embedding", "embedding"),
        ("post_tile_positional_embedding", "embedding"),
    ):
        table = np.array(vision[module][name])
        for ratio, (height, width) in enumerate(config.supported_aspect_ratios, start=1):
            table[ratio, height * width :] = 0
        table[0, 1:] = 0
        vision[module] = {**vision[module], name: jnp.asarray(table)}
    params = {**params, "vision_model": vision}
    random = np.random.default_rng(6)
    for tiles in (1, 2, 3, 4):
        pixels = random.integers(0, 256, (32, 32 * tiles, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{tiles}.png")

    def asked(number: int, *tiles: int) -> Request:
        parts = [{"type": "image", "image": str(tmp_path / f"{n}.png")} for n in tiles]
        content = [*parts, {"type": "text", "text": "Which digit is this?"}]
        message = {"role": "user", "content": content}
        return Request(str(number), "chat", (message,), options=GREEDY)

    requests = [asked(i, *t) for i, t in enumerate([(1,), (2,), (3,), (4,), (1, 3), (2, 2)])]
    sources = PictureSources((tmp_path,))
    engine = Engine(model, params, PROCESSOR, options=OPTIONS, sources=sources)
    engine.warm_up()
    programs = engine.stats.programs
    found = answers(engine, requests)
    # Of two, three and four tiles.
    assert programs == 2 * (2 + 1 + 1) + 3 + 1 + 1 + 1
    assert engine.stats.programs == programs
    for request in requests:
        [message] = request.messages or ()
        inputs = PROCESSOR.apply_chat_template(
            [message],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
        )
        expected = model.generate(params, **inputs, max_new_tokens=12)
        [choice] = found[request.custom_id].choices
        assert choice.token_ids == tuple(expected.new_tokens[0, : len(choice.token_ids)].tolist())


def test_requests_that_do_not_fit_fail_alone():
    fits = ask("fits", "Which digit is this?", 0)
    missing = {"role": "user", "content": [{"type": "image", "image": "no.png"}]}
    requests = [
        ask("tiles", "Which?", *range(9)),
        fits,
        ask("prompt", "Which digit is this? " * 60),
        ask("answer", "Which digit is this?", max_tokens=90),
        replace(fits, custom_id="stop", options=replace(GREEDY, stop_token_ids=(10**6,))),
        replace(fits, custom_id="missing", messages=(missing,)),
    ]
    engine = make_engine()
    found = answers(engine, requests)
    assert {name for name, result in found.items() if isinstance(result, Answer)} == {"fits"}
    errors = {name: str(result.error) for name, result in found.items() if name != "fits"}
    assert "tiles together, more than the 8 that a slot holds" in errors["tiles"]
    assert "96" in errors["prompt"]
    assert "max_tokens=90: together more than the 96" in errors["answer"]
    assert "stop_token_ids" in errors["stop"]
    assert "no.png" in errors["missing"]
    assert (engine.stats.done, engine.stats.failed) == (1, 5)


def test_stopping():
    """An end token, a stop token, a stop string, a limit, and what goes on behind the end."""
    base = ask("base", "Which digit is this?", 2, max_tokens=20)
    engine = make_engine()
    [choice] = answers(engine, [base])["base"].choices
    assert choice.finish_reason == "stop"
    assert choice.stop_reason is None
    *words, end = choice.token_ids
    decode = PROCESSOR.tokenizer.decode
    assert choice.text == decode(words, skip_special_tokens=True)
    last = decode(words[-1:]).strip()

    def changed(**options: Any) -> Any:
        request = replace(base, options=replace(base.options, **options))
        [choice] = answers(engine, [request])["base"].choices
        return choice

    stopped = changed(stop_token_ids=(words[0],))
    assert (stopped.token_ids, stopped.text) == ((words[0],), "")
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", words[0])
    stopped = changed(stop=("nothing", last))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", last)
    assert stopped.text == choice.text[: choice.text.index(last)]
    assert stopped.token_ids == tuple(words)
    kept = changed(stop=(last,), include_stop_str_in_output=True)
    assert kept.text == choice.text[: choice.text.index(last) + len(last)]
    assert changed(max_tokens=1).token_ids == (words[0],)
    assert changed(max_tokens=1).finish_reason == "length"
    longer = changed(ignore_eos=True, max_tokens=9)
    assert longer.token_ids[: len(words) + 1] == (*words, end)
    assert (len(longer.token_ids), longer.finish_reason) == (9, "length")
    assert len(changed(min_tokens=7, max_tokens=9).token_ids) >= 7


def test_several_answers_and_log_probabilities():
    sampled = ask("n", "Which digit is this?", 1, n=4, temperature=9.0, seed=3, logprobs=2)
    echo = SamplingOptions(max_tokens=0, echo=True, logprobs=0)
    prompt = tuple(range(5, 45))  # read in two chunks
    echoed = replace(
        sampled, custom_id="echo", kind="completion", messages=None, prompt=prompt, options=echo
    )
    found = answers(make_engine(), [sampled, echoed])

    choices = found["n"].choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert len({choice.token_ids for choice in choices}) > 1
    for choice in choices:
        assert [entry.token_id for entry in choice.logprobs] == list(choice.token_ids)
        for entry in choice.logprobs:
            assert len(entry.top) == 2
            assert entry.top[0][1] >= entry.top[1][1]
            assert entry.logprob <= entry.top[0][1]

    model, params = LOADED
    ids = found["echo"].prepared.input_ids
    output: Any = model.apply({"params": params}, input_ids=ids[None])
    expected = jax.nn.log_softmax(output.logits[0])
    assert found["echo"].choices[0].token_ids == ()
    first, *rest = found["echo"].prompt_logprobs
    assert first is None
    assert len(rest) == len(ids) - 1 >= 39
    for place, entry in enumerate(rest):
        assert entry.token_id == ids[place + 1]
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=2e-4)


def read_again(engine: Engine) -> Any:
    """A prompt's copy that isn't one: the slot reads the prompt and the pictures itself."""

    def copy_prompt(_: int, slot: int, answer: Any) -> Any:
        device, prepared = engine._device, answer.job.prepared
        whole = prepare(prepared.request, PROCESSOR, engine._sources, max_length=96, max_tiles=8)
        device.encode(whole.pictures)
        device.write_pictures(slot, whole.pictures)
        while (chunk := device.prefill(slot, answer)) is None:
            pass
        return chunk

    return copy_prompt


@pytest.mark.parametrize("n", [3, 7])
def test_answers_to_one_request_share_its_prompt(n: int):
    """In three slots; what differs is the draw."""
    one = ask("one", "Which digit is this? " * 5, 1, 4, temperature=2.0, seed=3, max_tokens=9)
    many = replace(one, options=replace(one.options, n=n, repetition_penalty=8.0, logprobs=1))
    engine = make_engine(pictures_kept=0)
    [answer] = engine.run([many])
    assert isinstance(answer, Answer)
    prompt = len(answer.prepared.input_ids)
    assert prompt > OPTIONS.prompt_lengths[-1]
    assert engine.stats.tokens_in == prompt
    assert (engine.stats.pictures_encoded, engine.stats.pictures_reused) == (2, 0)
    assert answer.prepared.num_bytes == 0  # nobody needs the pixels any more

    apart = make_engine()
    apart._device.copy_prompt = read_again(apart)  # type: ignore[method-assign]
    [expected] = apart.run([many])
    assert isinstance(expected, Answer)
    assert len({choice.token_ids for choice in answer.choices}) > 1
    for choice, other in zip(answer.choices, expected.choices, strict=True):
        assert (choice.token_ids, choice.text) == (other.token_ids, other.text)
        for entry, same in zip(choice.logprobs or (), other.logprobs or (), strict=True):
            assert entry.logprob == pytest.approx(same.logprob, abs=1e-4)


def test_a_default_limit_is_cut_to_the_room_and_a_given_one_is_not():
    text = "Which digit is this?"
    default = replace(GREEDY, max_tokens=None, default_max_tokens=500, ignore_eos=True)
    requests = [
        ask("default", text, options=default),
        ask("short default", text, options=replace(default, default_max_tokens=3)),
        ask("given", text, options=replace(default, max_tokens=500)),
    ]
    found = answers(make_engine(), requests)
    prompt = len(found["default"].prepared.input_ids)
    [choice] = found["default"].choices
    assert len(choice.token_ids) == OPTIONS.max_length - prompt + 1
    assert choice.finish_reason == "length"
    assert len(tokens(found["short default"])) == 3
    assert "max_tokens=500: together more than the 96" in str(found["given"].error)


@pytest.mark.parametrize("after", ["failure", "answer"])
def test_leaving_early_does_not_disturb_the_next_run(after: str):
    engine = make_engine()
    long = [
        ask(f"long {i}", "Which digit is this?", i, max_tokens=60, ignore_eos=True)
        for i in range(6)
    ]
    broken = ask("broken", "Which digit is this? " * 60)
    first = [long[0], broken] if after == "failure" else [ask("short", "Which?", max_tokens=2)]
    results = engine.run([*first, *long[1:]])
    # Which of the two comes first depends on which is prepared first.
    assert any(isinstance(result, Failure) == (after == "failure") for result in results)
    results.close()
    assert engine.stats.slots_busy == 0
    requests = mixed(5, seed=8)
    expected = answers(make_engine(), requests)
    found = answers(engine, requests)
    for name, answer in found.items():
        assert tokens(answer) == tokens(expected[name])


def test_it_stops_when_told():
    engine = make_engine()
    results = []
    for result in engine.run(iter(mixed(20, seed=5))):
        results.append(result)
        engine.stop()
    assert 1 <= len(results) < 20
    assert not any(isinstance(result, Failure) for result in results)
    assert engine.stats.slots_busy == 0
