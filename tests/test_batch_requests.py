"""Lines of a batch file: what is read, what is refused and how, and that nothing else comes out."""

import dataclasses
import json
import random

import pytest

from mllama_jax.batch.request_json import MAX_DEPTH, MAX_LINE_BYTES
from mllama_jax.batch.requests import (
    COMPLETION_MAX_TOKENS,
    Request,
    RequestError,
    SamplingOptions,
    default_options,
    parse_line,
    parse_record,
)
from mllama_jax.generation.config import GenerationConfig

ASK = [{"role": "user", "content": "What is it?"}]


def record(url="/v1/chat/completions", **body):
    if not body.keys() & {"messages", "prompt"}:
        body |= {"messages": ASK} if "chat" in url else {"prompt": "Once"}
    return {"custom_id": "one", "method": "POST", "url": url, "body": body}


def chat(**body):
    return parse_line(json.dumps(record(**body)), number=7)


def completion(**body):
    return parse_line(json.dumps(record("/v1/completions", **body)), number=7)


def refusal(parse, **body):
    with pytest.raises(RequestError) as caught:
        parse(**body)
    assert caught.value.status_code == 400
    assert caught.value.custom_id == "one"
    assert str(caught.value).startswith("line 7: ")
    return caught.value


def test_a_line_as_openai_documents_it():
    line = (
        b'{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": '
        b'{"model": "m", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", '
        b'"content": "Hello \\u00e9!"}], "max_tokens": 1000}}\n'
    )
    assert parse_line(line, number=1) == Request(
        custom_id="request-1",
        kind="chat",
        messages=(
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello é!"},
        ),
        model="m",
        options=SamplingOptions(max_tokens=1000),
    )


def test_every_parameter_of_a_chat():
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    given = {
        "max_completion_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "seed": 11,
        "stop": ["\n", "end", "\n"],
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "n": 4,
        "best_of": 4,
        "logprobs": True,
        "top_logprobs": 20,
        "logit_bias": {"17": -100, "18": 0.5},
        "bad_words": ["no"],
        "allowed_token_ids": [1, 2, 2],
        "response_format": schema,
    }
    assert chat(**given).options == SamplingOptions(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        seed=11,
        stop=("\n", "end"),
        stop_token_ids=(5, 6),
        ignore_eos=True,
        include_stop_str_in_output=True,
        n=4,
        logprobs=20,
        logit_bias={17: -100.0, 18: 0.5},
        bad_words=("no",),
        allowed_token_ids=(1, 2),
        response_format=schema,
    )
    assert {item.name for item in dataclasses.fields(SamplingOptions)} - {
        "echo",
        "default_max_tokens",
    } <= {
        "max_tokens",
        *given,
    }


def test_a_completion():
    request = completion(prompt="<|image|>Once", images=["a.png"], echo=True, logprobs=0, n=2)
    assert (request.kind, request.prompt, request.images) == (
        "completion",
        "<|image|>Once",
        ("a.png",),
    )
    options = SamplingOptions(default_max_tokens=COMPLETION_MAX_TOKENS, echo=True, logprobs=0, n=2)
    assert request.options == options
    assert completion(prompt=[5, 6]).prompt == (5, 6)
    assert completion(prompt=[[5, 6]]).prompt == (5, 6)
    assert completion(prompt=["alone"]).prompt == "alone"
    assert completion(echo=True, max_tokens=0).options.max_tokens == 0


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"stop": "x"}, "stop", ("x",)),
        ({"top_k": -1}, "top_k", 0),
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 1e-6}, "temperature", 0.0),
        ({"temperature": None, "n": None, "stop": None}, "temperature", 1.0),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": False, "top_logprobs": 0}, "logprobs", None),
        ({"response_format": {"type": "text"}}, "response_format", None),
        ({"response_format": {"type": "json_object"}}, "response_format", {"type": "json_object"}),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", 3),
        ({"seed": 2**32 - 1}, "seed", 2**32 - 1),
    ],
)
def test_ways_to_write_a_parameter(given, name, value):
    assert getattr(chat(**given).options, name) == value


def test_seeds_outside_of_32_bits_stay_apart():
    seeds = [-(2**63), -2, -1, 0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    folded = [chat(seed=seed).options.seed for seed in seeds]
    assert folded == [chat(seed=seed).options.seed for seed in seeds]
    assert len(set(folded)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in folded)


def test_what_changes_nothing_is_accepted():
    same = {
        "stream": False,
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "auto",
        "stream_options": None,
        "modalities": ["text"],
        "functions": None,
        "echo": False,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "skip_special_tokens": True,
        "guided_json": None,
        "chat_template_kwargs": {},
        "add_special_tokens": False,
        "priority": 3,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "anything": None,
    }
    assert chat(**same) == chat()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stream": True}, ["stream: true", "no one to stream to"]),
        ({"tools": [{"type": "function"}]}, ["tools", "not supported"]),
        ({"use_beam_search": True}, ["use_beam_search: true", "no beam search"]),
        ({"length_penalty": 0.5}, ["length_penalty: 0.5"]),
        ({"max_new_tokens": 5}, ["max_new_tokens", "did you mean 'max_tokens'?"]),
        ({"temprature": 1}, ["temprature", "did you mean 'temperature'?"]),
        ({"frequency_penality": 1}, ["did you mean 'frequency_penalty'?"]),
        ({"guided_json": {}}, ["guided_json", "did you mean 'response_format'?"]),
        ({"qqqqqqqq": 1}, ["qqqqqqqq: there is no such option"]),
        ({"echo": True}, ["echo: true", "/v1/completions"]),
        ({"prompt": "x"}, ["prompt", "/v1/completions"]),
        ({"images": ["x.png"]}, ["images", "parts of its messages"]),
        ({"best_of": 2}, ["best_of: found 2, and n is 1"]),
        ({"top_logprobs": 2}, ["top_logprobs", '"logprobs": true']),
        ({"max_tokens": 0}, ["max_tokens: found 0, expected at least 1"]),
        ({"max_tokens": 3, "max_completion_tokens": 4}, ["max_completion_tokens: found 4"]),
        ({"max_tokens": 3, "min_tokens": 4}, ["min_tokens: found 4, and max_tokens is 3"]),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            ["continue_final_message"],
        ),
        ({"model": 5}, ["model: found 5, expected a name"]),
        ({"response_format": {"type": "xml"}}, ["response_format", "json_schema"]),
        ({"response_format": {"type": "json_schema"}}, ["response_format", "as an object"]),
    ],
)
def test_the_rest_is_refused_by_name(given, words):
    error = refusal(chat, **given)
    assert error.field in given
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("value", [True, "1", 1.5, -1, 2**31, 10**30, [], {}])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "min_tokens", "n"])
def test_whole_numbers(name, value):
    assert refusal(chat, **{name: value}).field == name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, True, "0.5", 1000]),
        ("top_p", [0, 1.1, -1, False]),
        ("min_p", [-0.1, 1.5]),
        ("presence_penalty", [-2.5, 2.5]),
        ("frequency_penalty", [-2.5, 2.5]),
        ("repetition_penalty", [0, -1, 1000]),
        ("top_k", [-2, 2.0, True]),
        ("seed", [2**64, -(2**63) - 1, 0.5, True]),
        ("stop", ["", [""], [1], {}]),
        ("bad_words", [[""], [None]]),
        ("stop_token_ids", [5, [-1], [True], ["5"], [2**31]]),
        ("allowed_token_ids", [[], [1.0]]),
        ("logit_bias", [[], {"a": 1}, {"-1": 1}, {"1": 101}, {"1": True}, {"٣": 1}, {"1": None}]),
        ("logit_bias", [{"1": 1, "01": 2}, {"9" * 5000: 1}]),
        ("ignore_eos", [1, "true"]),
        ("logprobs", [1, "true"]),
        ("top_logprobs", [21, -1, True]),
    ],
)
def test_values_that_are_none(name, values):
    for value in values:
        given = {name: value} | ({"logprobs": True} if name == "top_logprobs" else {})
        assert refusal(chat, **given).field == name


def test_completions_have_their_own_parameters():
    assert "logprobs: found true" in str(refusal(completion, logprobs=True))
    assert "logprobs: 5" in str(refusal(completion, top_logprobs=3))
    assert "/v1/chat/completions" in str(refusal(completion, messages=ASK))
    assert "2 prompts; give each a line" in str(refusal(completion, prompt=["a", "b"]))
    for prompt in (None, [], [1, "a"], [-1], [True], 5, {}):
        assert refusal(completion, prompt=prompt).field == "prompt"
    for images in ("a.png", [1], [""], {"a": 1}):
        assert refusal(completion, images=images).field == "images"


def test_both_ways_to_write_a_picture():
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "image_url", "image_url": "data:image/png;base64,AA=="},
        {"type": "text", "text": "Compare."},
        *({"type": "image", key: "b.png"} for key in ("image", "url", "path")),
        {"type": "image", "base64": "AAAA", "path": None},
    ]
    [message] = chat(messages=[{"role": "user", "name": "Ann", "content": parts}]).messages
    assert message == {
        "role": "user",
        "name": "Ann",
        "content": [
            {"type": "image", "image": "a.png"},
            {"type": "image", "image": "data:image/png;base64,AA=="},
            {"type": "text", "text": "Compare."},
            *[{"type": "image", "image": "b.png"}] * 3,
            {"type": "image", "image": "data:image/*;base64,AAAA"},
        ],
    }


def test_messages_that_a_client_sends_back():
    sent_back = {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    request = chat(messages=[*ASK, sent_back], continue_final_message=True)
    assert request.messages[1] == {"role": "assistant", "content": "Yes."}
    assert (request.add_generation_prompt, request.continue_final_message) == (False, True)
    request = chat(messages=[*ASK, sent_back], add_generation_prompt=False)
    assert (request.add_generation_prompt, request.continue_final_message) == (False, False)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages: found null"),
        ([], "at least one message"),
        (["x"], "messages[0]: found 'x'"),
        ([{"content": "x"}], "messages[0].role: found null"),
        ([{"role": "developer", "content": "x"}], 'write "system"'),
        ([{"role": "user"}], "messages[0].content: found null"),
        ([*ASK, {"role": "user", "content": []}], "messages[1].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]: found a part 'x'"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "of type 'input_audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], 'its "text" is null'),
        ([{"role": "user", "content": [{"type": "image"}]}], "missing"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "missing"),
        (
            [{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}],
            "more than one way",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "path": "a", "max_pixels": 5}]}],
            "'max_pixels' is not supported",
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}],
            "'tool_calls' is not supported",
        ),
    ],
)
def test_messages_that_are_none(messages, words):
    error = refusal(chat, messages=messages)
    assert words in str(error)
    assert error.field.startswith("messages")


def test_all_problems_of_a_line_come_together():
    line = record(temperature="hot", max_new_tokens=3, n=0) | {"method": "GET", "max_tokens": 4}
    with pytest.raises(RequestError) as caught:
        parse_line(json.dumps(line), number=12)
    for word in ("line 12", "temperature", "max_new_tokens", "n: found 0", "'GET'", 'into "body"'):
        assert word in str(caught.value)
    many = str(refusal(chat, **{f"qqqqqqqq{i}": 1 for i in range(1000)}))
    assert len(many) < 3000
    assert "980 more problems" in many


@pytest.mark.parametrize(
    ("line", "words", "custom_id"),
    [
        (b"", "empty", None),
        ("  \n", "empty", None),
        (b"{", "not valid JSON", None),
        (b'{"custom_id": "one"', "not valid JSON", None),
        (b'"text"', "expected a JSON object", None),
        (b'{"a": "\xff"}', "not UTF-8", None),
        (b"[" * 200_000, "nested", None),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested", None),
        (b'{"custom_id": "one", "a": ' + b"[" * 150 + b"]" * 150 + b"}", "nested", "one"),
        (b'{"custom_id": "one", "body": NaN}', "NaN", "one"),
        (b'{"custom_id": "one", "body": -Infinity}', "-Infinity", "one"),
        (b'{"custom_id": "one", "body": 1e999}', "too large", "one"),
        (b'{"custom_id": "one", "body": ' + b"9" * 10_000 + b"}", "10000 digits", "one"),
        (b'{"custom_id": "one", "url": 1, "url": 2}', "'url' comes twice", "one"),
        (b'{"custom_id": "one", "body": {"user": "\\ud83d"}}', "surrogate", "one"),
        (b'{"custom_id": "\\ud83d"}', "surrogate", None),
        (b'{"custom_id": ""}', "custom_id: found ''", None),
        (b'{"custom_id": 5}', "custom_id: found 5", None),
        (b'{"custom_id": "' + b"x" * 2000 + b'"}', "1024 characters", None),
        (b'{"custom_id": "one"}', "body: found null", "one"),
        (b'{"custom_id": "one", "url": "/v1/embeddings"}', "/v1/embeddings", "one"),
    ],
)
def test_lines_that_are_none(line, words, custom_id):
    with pytest.raises(RequestError) as caught:
        parse_line(line, number=3)
    assert "line 3: " in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.custom_id == custom_id
    assert len(str(caught.value)) < 2000


def test_a_line_may_be_long_but_not_endless():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2**23}}
    content = [picture] * 4
    assert chat(messages=[{"role": "user", "content": content}]).messages[0]["content"][3]
    with pytest.raises(RequestError, match="give pictures as paths"):
        parse_line(b" " * (MAX_LINE_BYTES + 1), number=1)
    nested = {}
    for _ in range(MAX_DEPTH // 2):
        nested = {"properties": nested}
    schema = {"type": "json_schema", "json_schema": {"schema": nested}}
    assert chat(response_format=schema).options.response_format == schema


def test_a_byte_order_mark_is_no_problem():
    assert parse_line(b"\xef\xbb\xbf" + json.dumps(record()).encode(), number=1) == chat()


def test_records_of_python_are_read_like_lines():
    assert parse_record(record(temperature=0)) == chat(temperature=0)
    with pytest.raises(RequestError, match=r"^n: found 0"):
        parse_record(record(n=0))


def test_defaults_hold_where_a_line_says_nothing():
    defaults = SamplingOptions(max_tokens=5, min_tokens=2, temperature=0.6, top_p=0.9)
    line = json.dumps(record("/v1/completions", temperature=0, top_p=None))
    options = parse_line(line, number=1, defaults=defaults).options
    assert options == SamplingOptions(max_tokens=5, min_tokens=2, temperature=0.0, top_p=0.9)
    line = json.dumps(record(max_tokens=1))
    assert parse_line(line, number=1, defaults=defaults).options.min_tokens == 1


def test_the_checkpoints_own_defaults():
    released = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
    assert default_options(GenerationConfig.from_dict(released)) == SamplingOptions(
        temperature=0.6, top_p=0.9
    )
    assert default_options(GenerationConfig()) == SamplingOptions(temperature=0.0)
    full = {
        "do_sample": True,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "max_new_tokens": 9,
        "min_new_tokens": 1,
        "stop_strings": "END",
        "temperature": None,
    }
    assert default_options(GenerationConfig.from_dict(full)) == SamplingOptions(
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.2,
        default_max_tokens=9,
        min_tokens=1,
        stop=("END",),
    )


# --- fuzzing --------------------------------------------------------------------------------------

GOOD = [
    record(temperature=0.5, stop=["a", "b"], logprobs=True, top_logprobs=3, seed=5),
    record(
        messages=[
            {"role": "system", "content": "é"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "x"},
                ],
            },
        ],
        logit_bias={"5": 1},
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    ),
    record("/v1/completions", prompt=[1, 2], echo=True, max_tokens=0, images=["a.png"]),
]
ODD = [None, True, False, 0, -1, 1.5, 10**40, 1e308, "", "x", "\ud800", "\0", [], {}, [[]], [None]]


def mutated_value(value, rng):
    """A copy of JSON data with one odd value or key somewhere."""
    value = json.loads(json.dumps(value))
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    node, key = rng.choice(places)
    what = rng.randrange(4)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[key + rng.choice("sx_")] = node.pop(key)
    elif what == 2:
        other, place = rng.choice(places)
        node[key] = json.loads(json.dumps(other[place]))
    else:
        node[key] = rng.choice(ODD)
    return value


def mutated_bytes(line, rng):
    data = bytearray(line)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        what = rng.randrange(3)
        if what == 0:
            data[at] = rng.randrange(256)
        elif what == 1:
            del data[at : at + rng.randint(1, 20)]
        else:
            data[at:at] = rng.choice([b'"', b"{", b"]", b",", b"\\ud800", b"NaN", b"9" * 30])
    return bytes(data) or b"{"


def test_nothing_but_requests_and_their_errors_comes_out():
    rng = random.Random(1)
    outcomes = {Request: 0, RequestError: 0}
    longest = 0
    for _ in range(5000):
        value = rng.choice(GOOD)
        for _ in range(rng.randint(0, 3)):
            value = mutated_value(value, rng)
        line = json.dumps(value).encode()
        if rng.random() < 0.3:
            line = mutated_bytes(line, rng)
        try:
            outcome = parse_line(line, number=1)
            assert isinstance(outcome.options.max_tokens, int | None)
            json.dumps(dataclasses.asdict(outcome), allow_nan=False, ensure_ascii=False).encode()
        except RequestError as error:
            outcome = error
            longest = max(longest, len(str(error).encode()))
        outcomes[type(outcome)] += 1
    assert min(outcomes.values()) > 500
    assert longest < 5000
