"""`generate` on a small random model: what it depends on, where it stops, what it refuses."""

from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import pytest

import mllama_jax as mj
from mllama_jax.generation import decoding
from mllama_jax.generation.generate import GenerateOutput

CONFIG = mj.MllamaConfig(
    text_config={
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 100.0,
        "max_position_embeddings": 40,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    },
    vision_config={
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_layers_indices": [1],
        "vision_output_dim": 32,
        "num_attention_heads": 2,
        "image_size": 10,
        "patch_size": 5,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
    image_token_index=61,
)
NEW = 12
# (tokens, places of image tokens) of each row.
ROWS = ((9, (2, 5)), (6, ()), (4, (1,)), (11, (0,)))
SEEDS = [11, 12, 13, 14]

Inputs = dict[str, np.ndarray]


class PieceTokenizer:
    """Decodes a token to some bytes; pairs of tokens make up a character here and there."""

    def __init__(self) -> None:
        self.pieces = [chr(ord("A") + token % 26).encode() * (1 + token % 3) for token in range(69)]

    def decode(
        self, token_ids: Any, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        assert not clean_up_tokenization_spaces
        kept = [int(token) for token in token_ids if token > 2 or not skip_special_tokens]
        return b"".join(self.pieces[token] for token in kept).decode(errors="replace")


def make_inputs(rows: Any = ROWS, side: str = "left", extra: int = 0, images: int = 0) -> Inputs:
    """A batch; a row's tokens and pictures depend on its length and places alone."""
    width = max(length for length, _ in rows) + extra
    num_images = max(images, *(len(places) for _, places in rows), 0)
    batch: Inputs = {
        "input_ids": np.zeros((len(rows), width), np.int64),
        "attention_mask": np.zeros((len(rows), width), np.int64),
        "pixel_values": np.zeros((len(rows), num_images, 2, 3, 10, 10), np.float32),
        "aspect_ratio_ids": np.zeros((len(rows), num_images), np.int64),
        "aspect_ratio_mask": np.zeros((len(rows), num_images, 2), np.int64),
        "cross_attention_mask": np.zeros((len(rows), width, num_images, 2), np.int64),
    }
    for row, (length, places) in enumerate(rows):
        random = np.random.default_rng(length)
        first = width - length if side == "left" else 0
        ids = random.integers(3, 61, length)
        ids[list(places)] = 61
        batch["input_ids"][row, first : first + length] = ids
        batch["attention_mask"][row, first : first + length] = 1
        for image, place in enumerate(places):
            ratio = int(random.integers(1, 4))
            tiles = slice(min(ratio, 2))
            end = width if place == places[-1] else first + places[image + 1]
            pixels = random.normal(size=(2, 3, 10, 10))
            batch["pixel_values"][row, image, tiles] = pixels[tiles]
            batch["aspect_ratio_ids"][row, image] = ratio
            batch["aspect_ratio_mask"][row, image, tiles] = 1
            batch["cross_attention_mask"][row, first + place : end, image, tiles] = 1
    if not num_images:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    return batch


def lively(shapes: dict[str, Any]) -> dict[str, Any]:
    """Random weights of a size at which every part of the model shows, gates far from zero."""
    random = np.random.default_rng(2)

    def draw(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = random.normal(size=leaf.shape).astype(np.float32)
        if path[-1] == "scale":
            return 1 + 0.3 * values
        if path[-1].endswith("gate"):
            return 0.5 * np.sign(values)
        if path[-1] == "kernel":
            return 0.25 * values
        return values

    return flax.traverse_util.path_aware_map(draw, shapes)


@pytest.fixture(scope="module")
def model() -> mj.MllamaForConditionalGeneration:
    return mj.MllamaForConditionalGeneration(CONFIG)


@pytest.fixture(scope="module")
def params(model: mj.MllamaForConditionalGeneration) -> dict[str, Any]:
    return lively(model.param_shapes())


@pytest.fixture(scope="module")
def run(model: mj.MllamaForConditionalGeneration, params: dict[str, Any]) -> Any:
    def generate(inputs: Inputs | None = None, **options: Any) -> GenerateOutput:
        inputs = make_inputs() if inputs is None else inputs
        return model.generate(params, **inputs, **{"max_new_tokens": NEW, **options})

    return generate


@pytest.fixture(scope="module")
def greedy(run: Any) -> GenerateOutput:
    return run()


SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.95}


# What the answer must not depend on


def test_sequences_hold_the_prompts_and_the_answers(greedy: GenerateOutput):
    prompts = make_inputs()["input_ids"]
    assert greedy.sequences.dtype == np.int32
    np.testing.assert_array_equal(greedy.sequences[:, : prompts.shape[1]], prompts)
    assert greedy.new_tokens.shape == (4, NEW)
    assert greedy.num_new_tokens.tolist() == [NEW] * 4
    assert greedy.finish_reason == ("length",) * 4
    # The rows say different things, and more than one.
    assert len({tuple(row) for row in greedy.new_tokens.tolist()}) == 4
    assert all(len(set(row)) > 2 for row in greedy.new_tokens.tolist())


def test_each_token_is_the_full_forward_pass_s_first_choice(
    model: mj.MllamaForConditionalGeneration, params: dict[str, Any], greedy: GenerateOutput
):
    inputs = make_inputs()
    width = inputs["input_ids"].shape[1]
    for name in ("attention_mask", "cross_attention_mask"):
        last = inputs[name][:, -1:]
        inputs[name] = np.concatenate([inputs[name], np.repeat(last, NEW, axis=1)], axis=1)
    inputs["input_ids"] = greedy.sequences
    positions = np.maximum(inputs["attention_mask"].cumsum(1) - 1, 0)
    logits = jax.jit(model.apply)({"params": params}, **inputs, position_ids=positions).logits
    np.testing.assert_array_equal(logits[:, width - 1 : -1].argmax(-1), greedy.new_tokens)


@pytest.mark.parametrize("row", [0, 1])
def test_a_row_s_answer_is_the_same_alone(run: Any, greedy: GenerateOutput, row: int):
    together = run(seed=SEEDS, **SAMPLED)
    alone = make_inputs(ROWS[row : row + 1])
    np.testing.assert_array_equal(run(alone).new_tokens[0], greedy.new_tokens[row])
    sampled = run(alone, seed=SEEDS[row : row + 1], **SAMPLED)
    np.testing.assert_array_equal(sampled.new_tokens[0], together.new_tokens[row])


def test_a_row_s_answer_does_not_depend_on_its_neighbours(run: Any, greedy: GenerateOutput):
    """Other places, other neighbours, prompts and image slots of other buckets."""
    rows = (ROWS[2], (40, (3, 7, 30)), ROWS[1], ROWS[0])
    other = run(make_inputs(rows, extra=2, images=5))
    np.testing.assert_array_equal(other.new_tokens[[0, 2, 3]], greedy.new_tokens[[2, 1, 0]])


def test_the_padding_side_does_not_matter(run: Any, greedy: GenerateOutput):
    right = make_inputs(side="right", extra=3)
    output = run(right)
    np.testing.assert_array_equal(output.new_tokens, greedy.new_tokens)
    np.testing.assert_array_equal(output.sequences[:, :-NEW], right["input_ids"])


def test_pictures_change_the_answer(run: Any, greedy: GenerateOutput):
    inputs = make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"] + 1
    changed = (run(inputs).new_tokens != greedy.new_tokens).any(1)
    assert changed.tolist() == [True, False, True, True]


def features_of(model: Any, params: dict[str, Any], inputs: dict[str, Any]) -> jax.Array:
    encode = jax.jit(lambda *images: model.apply(*images, method="encode_images"))
    images = [inputs[x] for x in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
    return encode({"params": params}, *images)


def test_jax_arrays_and_features_do_as_well(
    run: Any,
    model: mj.MllamaForConditionalGeneration,
    params: dict[str, Any],
    greedy: GenerateOutput,
):
    inputs: dict[str, Any] = {name: jax.numpy.asarray(x) for name, x in make_inputs().items()}
    np.testing.assert_array_equal(run(inputs).sequences, greedy.sequences)
    states = features_of(model, params, inputs)
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        del inputs[name]
    features = run({**inputs, "cross_attention_states": states})
    np.testing.assert_array_equal(features.sequences, greedy.sequences)
    language_model = mj.MllamaForCausalLM(CONFIG.text_config)
    alone = language_model.generate(
        params["language_model"], **inputs, cross_attention_states=states, max_new_tokens=NEW
    )
    np.testing.assert_array_equal(alone.sequences, greedy.sequences)


def test_without_a_cross_attention_mask_all_tiles_are_seen(run: Any):
    inputs = make_inputs(((11, (0,)),) * 4, images=2)
    everything = np.ones_like(inputs.pop("cross_attention_mask"))
    np.testing.assert_array_equal(
        run(inputs).sequences, run({**inputs, "cross_attention_mask": everything}).sequences
    )


def test_text_alone_is_the_language_model_alone(run: Any, params: dict[str, Any]):
    text = make_inputs(ROWS[1:2])
    language_model = mj.MllamaForCausalLM(CONFIG.text_config)
    expected = language_model.generate(params["language_model"], **text, max_new_tokens=NEW)
    np.testing.assert_array_equal(run(text).sequences, expected.sequences)
    # Empty picture slots make no difference.
    empty = make_inputs(ROWS[1:2], images=2)
    np.testing.assert_array_equal(run(empty).sequences, expected.sequences)


def test_pictures_are_encoded_in_small_batches_and_only_if_wanted(
    model: mj.MllamaForConditionalGeneration, params: dict[str, Any]
):
    inputs = make_inputs(((9, (1, 2, 3, 4)),) * 3)
    images = [inputs[x] for x in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
    wanted = np.ones((3, 4), bool)
    wanted[1, 2] = wanted[2, 0] = False
    found = decoding.encode_pictures(model, params, *images, wanted, 6)
    assert 8 < wanted.sum() < 16  # more than one batch of pictures, the second not full
    expected = (
        np.asarray(features_of(model, params, inputs)).reshape(3, 4, -1, 24)
        * wanted[:, :, None, None]
    )
    found = np.asarray(found).reshape(3, 6, -1, 24)
    np.testing.assert_allclose(found[:, :4], expected, rtol=1e-4, atol=1e-4)
    assert not found[:, 4:].any()


def test_no_new_program_within_a_bucket(run: Any):
    def sizes() -> list[int]:
        programs = (decoding.prefill, decoding.decode, decoding.encode)
        return [program._cache_size() for program in programs]

    run()
    before = sizes()
    run(make_inputs(((13, (3,)), (2, (1,)), (20, (4, 9)), (5, ()))), max_new_tokens=3)
    run(make_inputs(side="right", extra=9), max_new_tokens=33)
    run(seed=5, **SAMPLED)
    run(eos_token_id=[3, 4], pad_token_id=7, min_new_tokens=2, do_sample=True, min_p=0.1)
    run(stop_strings=["AA"], tokenizer=PieceTokenizer())
    run(generation_config=mj.GenerationConfig(eos_token_id=9))
    assert sizes() == before


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 2), (2, 2), (3, 5), (5, 5), (6, 10), (10, 10), (11, 15)]
)
def test_buckets(size: int, expected: int):
    assert decoding.bucket(size, (2, 5)) == expected


# Sampling


def test_seeds(run: Any):
    rows = (ROWS[0],) * 4
    same = run(make_inputs(rows), seed=[5, 6, 5, 7], **SAMPLED).new_tokens
    np.testing.assert_array_equal(same[0], same[2])
    assert len({tuple(row) for row in same.tolist()}) == 3
    one = run(make_inputs(rows), seed=5, **SAMPLED).new_tokens
    np.testing.assert_array_equal(one, run(make_inputs(rows), seed=5, **SAMPLED).new_tokens)
    assert len({tuple(row) for row in one.tolist()}) == 4


def test_options_without_do_sample_do_nothing(run: Any, greedy: GenerateOutput):
    output = run(temperature=3.0, top_p=0.5, seed=9)
    np.testing.assert_array_equal(output.sequences, greedy.sequences)


def test_the_most_likely_of_one_is_greedy(run: Any, greedy: GenerateOutput):
    output = run(do_sample=True, top_k=1, seed=9)
    np.testing.assert_array_equal(output.sequences, greedy.sequences)


# Where answers end


def cut(tokens: np.ndarray, ends: set[int], pad: int) -> tuple[list[list[int]], list[int]]:
    """Each row up to its first end token, filled up."""
    rows, lengths = [], []
    for row in tokens.tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:length] + [pad] * (len(row) - length))
        lengths.append(length)
    return [row[: max(lengths)] for row in rows], lengths


@pytest.mark.parametrize("several", [False, True])
def test_end_tokens(run: Any, greedy: GenerateOutput, several: bool):
    ends = {int(greedy.new_tokens[0, 3])}
    if several:
        ends |= {int(greedy.new_tokens[row, 5]) for row in range(1, 4)}
    expected, lengths = cut(greedy.new_tokens, ends, pad=7)
    output = run(eos_token_id=sorted(ends) if several else ends.pop(), pad_token_id=7)
    assert output.new_tokens.tolist() == expected
    assert output.num_new_tokens.tolist() == lengths
    assert output.finish_reason == tuple("stop" if n < NEW else "length" for n in lengths)
    assert "stop" in output.finish_reason


def test_the_last_token_may_be_an_end_token(run: Any, greedy: GenerateOutput):
    second = [int(token) for token in greedy.new_tokens[:, 1]]
    output = run(eos_token_id=second, max_new_tokens=2)
    assert output.finish_reason == ("stop",) * 4
    assert output.num_new_tokens.max() == 2


def test_padding_falls_back_on_the_first_end_token(run: Any, greedy: GenerateOutput):
    end = int(greedy.new_tokens[0, 0])
    settings = mj.GenerationConfig(eos_token_id=(end, 5), max_new_tokens=NEW)
    output = run(generation_config=settings)
    assert (output.new_tokens[0, output.num_new_tokens[0] :] == end).all()


def test_min_new_tokens(run: Any, greedy: GenerateOutput):
    ends = sorted({int(token) for token in greedy.new_tokens[:, :2].ravel()})
    output = run(eos_token_id=ends, min_new_tokens=5)
    assert (output.num_new_tokens > 5).all()
    assert not np.isin(output.new_tokens[:, :5], ends).any()


@pytest.mark.parametrize("start", [2, 5])
def test_stop_strings(run: Any, greedy: GenerateOutput, start: int):
    """The string spans the end of one token, two whole ones and the beginning of a fourth."""
    tokenizer = PieceTokenizer()
    pieces = [tokenizer.pieces[token].decode() for token in greedy.new_tokens[0]]
    stop = pieces[start][-1] + "".join(pieces[start + 1 : start + 3]) + pieces[start + 3][0]
    text = "".join(pieces)
    end = text.index(stop) + len(stop)
    length = next(n for n in range(NEW + 1) if len("".join(pieces[:n])) >= end)
    output = run(stop_strings=[stop, "never"], tokenizer=tokenizer)
    assert output.num_new_tokens[0] == length < NEW
    assert output.finish_reason[0] == "stop"
    np.testing.assert_array_equal(output.new_tokens[0, :length], greedy.new_tokens[0, :length])
    assert (output.new_tokens[0, length:] == 0).all()
    others = [row for row in (1, 2, 3) if output.finish_reason[row] == "length"]
    assert others
    np.testing.assert_array_equal(output.new_tokens[others], greedy.new_tokens[others])


def test_a_stop_string_may_begin_in_the_prompt_but_not_end_there(run: Any, greedy: GenerateOutput):
    tokenizer = PieceTokenizer()
    prompt = make_inputs(ROWS[1:2])["input_ids"][0]
    tokens = [*prompt, *greedy.new_tokens[1]]
    pieces = [tokenizer.pieces[token].decode() for token in tokens]
    in_prompt = "".join(pieces[1:3])
    across = "".join(pieces[len(prompt) - 2 : len(prompt) + 2])
    inputs = make_inputs(ROWS[1:2])
    assert run(inputs, stop_strings=across, tokenizer=tokenizer).num_new_tokens.tolist() == [2]
    output = run(inputs, stop_strings=in_prompt, tokenizer=tokenizer)
    assert (in_prompt in "".join(pieces[len(prompt) - 1 :])) == (output.num_new_tokens[0] < NEW)


def test_streamed_pieces_add_up_to_the_text(run: Any, greedy: GenerateOutput):
    tokenizer = PieceTokenizer()
    # A character of three bytes that two tokens share, and one that never becomes complete.
    answer = greedy.new_tokens[1].tolist()
    tokenizer.pieces[answer[0]], tokenizer.pieces[answer[1]] = b"x\xe2\x82", b"\xacy"
    tokenizer.pieces[int(greedy.new_tokens[3, -1])] = b"\xe2"
    calls: list[tuple[int, str]] = []
    ends = [int(greedy.new_tokens[1, 4])]
    for tokenizer_or_processor in (tokenizer, type("Processor", (), {"tokenizer": tokenizer})()):
        calls.clear()
        output = run(
            eos_token_id=ends,
            tokenizer=tokenizer_or_processor,
            streamer=lambda row, text: calls.append((row, text)),
        )
        for row, length in enumerate(output.num_new_tokens):
            ids = output.new_tokens[row, :length]
            expected = tokenizer.decode(ids, True, False)
            assert "".join(text for at, text in calls if at == row) == expected
        assert output.num_new_tokens[1] < NEW
    assert len(calls) > 8  # several a row
    assert all("\ufffd" not in text for row, text in calls if row == 1)
    assert "€" in "".join(text for row, text in calls if row == 1)


def test_streaming_ends_with_the_stop_string(run: Any, greedy: GenerateOutput):
    tokenizer = PieceTokenizer()
    pieces = [tokenizer.pieces[token].decode() for token in greedy.new_tokens[1]]
    calls: list[str] = []
    output = run(
        make_inputs(ROWS[1:2]),
        stop_strings=pieces[2] + pieces[3],
        tokenizer=tokenizer,
        streamer=lambda _, text: calls.append(text),
    )
    assert "".join(calls) == tokenizer.decode(output.new_tokens[0], True, False)
    assert output.finish_reason == ("stop",)


# Lengths and defaults


def width_of(output: GenerateOutput) -> int:
    return output.sequences.shape[1]


def test_lengths(run: Any, model: mj.MllamaForConditionalGeneration, params: dict[str, Any]):
    inputs = make_inputs()
    prompt = inputs["input_ids"].shape[1]
    assert width_of(model.generate(params, **inputs)) == prompt + 20
    assert width_of(model.generate(params, **inputs, max_length=20)) == 20
    assert width_of(model.generate(params, **inputs, max_length=prompt + 2)) == prompt + 2
    assert width_of(run(max_length=prompt + 2, max_new_tokens=4)) == prompt + 4
    settings = mj.GenerationConfig(max_new_tokens=30)
    assert width_of(run(generation_config=settings, max_new_tokens=2)) == prompt + 2
    longer = model.generate(params, **inputs, generation_config=settings, max_length=prompt + 3)
    assert width_of(longer) == prompt + 3


def test_the_default_length_stays_within_the_model_s_positions(
    model: mj.MllamaForConditionalGeneration, params: dict[str, Any]
):
    output = model.generate(params, np.full((1, 31), 5))
    assert width_of(output) == 40


def test_defaults_come_from_the_checkpoint(
    params: dict[str, Any], greedy: GenerateOutput, tmp_path: Path
):
    """Out of generation_config.json; without one, the special tokens of config.json."""
    inputs, answer = make_inputs(ROWS[1:2]), greedy.new_tokens[1:2]
    ends = [int(answer[0, 1]), int(answer[0, 4])]
    text_config = CONFIG.text_config.to_dict() | {"eos_token_id": [ends[1]], "pad_token_id": 4}
    config = mj.MllamaConfig.from_dict(CONFIG.to_dict() | {"text_config": text_config})
    settings = mj.GenerationConfig(eos_token_id=[ends[0], 60], max_new_tokens=7, pad_token_id=9)
    model = mj.MllamaForConditionalGeneration(config, generation_config=settings)
    model.save_pretrained(params, tmp_path)
    loaded, _ = mj.MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config == settings

    def answers() -> list[list[int]]:
        loaded, params = mj.MllamaForCausalLM.from_pretrained(tmp_path)
        return loaded.generate(params, **inputs).new_tokens.tolist()

    assert answers() == cut(answer, {ends[0]}, pad=9)[0]
    (tmp_path / "generation_config.json").unlink()
    assert answers() == cut(answer, {ends[1]}, pad=4)[0]


def test_a_prompt_without_a_mask_may_end_with_an_end_token_that_pads(run: Any):
    text = make_inputs(ROWS[1:2])
    text["input_ids"][0, -1] = 3
    expected = run(text, eos_token_id=3, pad_token_id=3)
    del text["attention_mask"]
    found = run(text, eos_token_id=3, pad_token_id=3)
    np.testing.assert_array_equal(found.sequences, expected.sequences)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 5}, r"'max_tokens' \(did you mean 'max_new_tokens'\?\)"),
        ({"pixel_value": 5}, r"'pixel_value' \(did you mean 'pixel_values'\?\)"),
        ({"num_beams": 4}, "no such option: 'num_beams'"),
    ],
)
def test_unknown_options(run: Any, options: dict[str, Any], message: str):
    with pytest.raises(TypeError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 2.0}, "top_p=2.0"),
        ({"max_length": 11, "max_new_tokens": None}, "11 columns, max_length=11 leaves no room"),
        ({"min_new_tokens": 99}, "min_new_tokens=99 is more than the 12 new tokens"),
        ({"eos_token_id": 61}, "eos_token_id=61: 61 is not in the vocabulary of 61 tokens"),
        ({"streamer": print}, "streamer needs tokenizer="),
        ({"stop_strings": "x"}, "stop_strings needs tokenizer="),
        ({"seed": [1, 2]}, "seed has 2 values, but the batch has 4 rows"),
        (
            {"generation_config": mj.GenerationConfig(extra={"num_beams": 4})},
            "asks for num_beams=4, which generate does not do",
        ),
    ],
)
def test_unusable_options(run: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(**options)


def changed(**changes: Any) -> Inputs:
    inputs = make_inputs() | changes
    return {name: value for name, value in inputs.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.zeros(4, int)}, r"input_ids is int64 of shape \(4,\)"),
        ({"input_ids": np.zeros((4, 0), int)}, "neither of them 0"),
        ({"input_ids": np.zeros((4, 11))}, "input_ids is float64"),
        ({"input_ids": np.full((4, 11), 69)}, r"input_ids\[0, 0\] is 69, but the model has 69"),
        ({"input_ids": np.full((4, 11), -1)}, r"input_ids\[0, 0\] is -1"),
        ({"attention_mask": None}, "begins or ends with pad_token_id=0"),
        ({"attention_mask": np.ones((4, 12))}, r"attention_mask has shape \(4, 12\)"),
        ({"attention_mask": np.eye(4, 11) * 0}, "row 0 has no tokens"),
        ({"attention_mask": np.tile([[1] * 5 + [0] + [1] * 5], (4, 1))}, "zeros between ones"),
        ({"pixel_values": None}, "aspect_ratio_ids was given without pixel_values"),
        ({"aspect_ratio_ids": None}, "pixel_values needs aspect_ratio_ids"),
        ({"cross_attention_states": np.zeros((4, 10, 24))}, "exclude each other"),
        ({"pixel_values": np.zeros((4, 2, 2, 3, 10, 11))}, "pixel_values has shape"),
        ({"pixel_values": np.zeros((3, 2, 2, 3, 10, 10))}, r"expected \(batch=4, images"),
        ({"aspect_ratio_ids": np.zeros((4, 3), int)}, r"aspect_ratio_ids has shape \(4, 3\)"),
        ({"aspect_ratio_mask": np.zeros((4, 2, 4))}, "aspect_ratio_mask has shape"),
        ({"cross_attention_mask": np.ones((4, 11, 2, 4))}, r"expected \(4, 11, 2, 2\)"),
    ],
)
def test_unusable_inputs(run: Any, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_states": np.zeros((4, 10, 23))}, "hidden_size=24"),
        ({"cross_attention_states": np.zeros((4, 10))}, "cross_attention_states has shape"),
        (
            {"cross_attention_states": np.zeros((4, 9, 24))},
            r"cross_attention_mask has shape \(4, 11, 2, 2\).* 9 image tokens",
        ),
    ],
)
def test_unusable_features(run: Any, changes: dict[str, Any], message: str):
    pictures = dict.fromkeys(("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
    with pytest.raises(ValueError, match=message):
        run(changed(**pictures, **changes))


def test_the_language_model_takes_no_pixels(params: dict[str, Any]):
    with pytest.raises(ValueError, match="MllamaForCausalLM has no vision encoder"):
        mj.MllamaForCausalLM(CONFIG.text_config).generate(params["language_model"], **make_inputs())
