"""The processor: transformers' arrays, samples that do not disturb each other, clear errors."""

import base64
import io
import json
import random

import numpy as np
import pytest
from PIL import Image
from processor_folders import TILE
from prompt_maker import PIECES, random_picture, random_text
from real_tokenizer import BOS, IMAGE
from tokenizers import processors
from transformers import AutoProcessor
from word_tokenizer import word_tokenizer

from mllama_jax import MllamaImageProcessor, MllamaProcessor, MllamaTokenizer
from mllama_jax.processing.prompt_images import image_spans

HAIKU = "<|image|>If I had to write a haiku for this one"
HAIKU_IDS = [128256, 128000, 2746, 358, 1047, 311, 3350, 264, 6520, 39342, 369, 420, 832]
WIDE, TALL, SMALL = ((3 * TILE, TILE), (TILE, 2 * TILE), (9, 5))
ARRAYS = ("input_ids", "attention_mask", "aspect_ratio_ids", "aspect_ratio_mask")


def picture(size=SMALL, value=200):
    return Image.new("RGB", size, (value, 0, 255 - value))


def user(*parts):
    """A conversation of one message: strings are text, everything else is a picture."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def assert_same(ours, theirs):
    """Same fields, same values."""
    assert set(ours) == set(theirs)
    for name in ours:
        expected = np.asarray(theirs[name])
        assert ours[name].dtype == expected.dtype
        if name == "pixel_values":
            np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(ours[name], expected, err_msg=name)


@pytest.fixture
def small(processor):
    """A processor whose tokenizer is quick to write and read."""
    tokenizer = word_tokenizer(extra_special_tokens={"image_token": "<img>"})
    return MllamaProcessor(processor.image_processor, tokenizer)


def test_other_image_tokens(small):
    inputs = small([[picture()], []], ["<img>a", "b"], padding=True)
    assert inputs.input_ids == [[10, 8, 1], [8, 2, 9]]


# --- what transformers returns --------------------------------------------------------------------


def test_golden_ids(processor):
    inputs = processor(images=picture(), text=HAIKU, return_tensors="np")
    assert inputs.input_ids.tolist() == [HAIKU_IDS]
    assert processor.decode(inputs.input_ids[0]) == f"<|image|>{BOS}{HAIKU[9:]}"
    assert processor.batch_decode(inputs.input_ids, skip_special_tokens=True) == [HAIKU[9:]]


def random_prompt(rng, num_images):
    pieces = [random_text(rng, PIECES, most=3) for _ in range(num_images + 1)]
    start = rng.choice(["", "", BOS])
    if rng.random() < 0.5:
        pieces[0] = ""
    return start + "<|image|>".join(pieces)


@pytest.mark.parametrize("side", ["right", "left"])
def test_raw_prompts_give_what_transformers_gives(processor, hf_processor, monkeypatch, side):
    monkeypatch.setattr(hf_processor.tokenizer, "padding_side", side)
    rng = random.Random(side)
    for _ in range(60):
        most = rng.choice([0, 2, 3])
        counts = [rng.randrange(1, most + 1) if most else 0 for _ in range(rng.randrange(1, 4))]
        texts = [random_prompt(rng, count) for count in counts]
        images = [[random_picture(rng) for _ in range(count)] for count in counts]
        options = {"padding": True, "return_tensors": "np"}
        if rng.random() < 0.3:
            options["pad_to_multiple_of"] = 8
        given = {"text": texts, "images": images if most else None} | options
        ours, theirs = processor(**given, padding_side=side), hf_processor(**given)
        assert_same(ours, theirs)
        assert list(ours) == [name for name in processor.model_input_names if name in ours]


def test_conversations_give_what_transformers_gives(processor, hf_processor):
    rng = random.Random(5)
    for _ in range(60):
        chats = []
        for _ in range(rng.randrange(1, 3)):
            pictures = [random_picture(rng) for _ in range(rng.randrange(1, 4))]
            texts = [random_text(rng, PIECES[:16], most=4) for _ in range(3)]
            parts = rng.sample(pictures + texts, len(pictures) + len(texts))
            answer = [{"role": "assistant", "content": [{"type": "text", "text": texts[0]}]}]
            chats.append(user(*parts) + rng.choice([[], answer + user(texts[1])]))
        options = {"tokenize": True, "return_dict": True, "return_tensors": "np", "padding": True}
        options |= {"add_generation_prompt": rng.random() < 0.5, "date_string": "26 Jul 2024"}
        ours = processor.apply_chat_template(chats, **options)
        assert_same(ours, hf_processor.apply_chat_template(chats, **options))


def test_system_and_image(processor):
    chat = [{"role": "system", "content": "Be brief."}, *user(picture(), "What is it?")]
    options = {"tokenize": True, "return_dict": True, "date_string": "26 Jul 2024"}
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, **options)
    text = processor.decode(inputs.input_ids[0])
    assert text.startswith(f"{BOS}<|start_header_id|>system<|end_header_id|>\n\nCutting")
    assert "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>" in text
    assert text.count(BOS) == text.count(IMAGE) == 1
    assert text.endswith("What is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_model_input_names(processor, hf_processor):
    assert processor.model_input_names == hf_processor.model_input_names


# --- kinds of output ------------------------------------------------------------------------------


def test_kinds_of_arrays(processor):
    given = {"images": picture(WIDE), "text": HAIKU}
    lists = processor(**given)
    assert lists.input_ids == [HAIKU_IDS]
    assert isinstance(lists.pixel_values, np.ndarray)
    numpy, jax = (processor(**given, return_tensors=kind) for kind in ("np", "jax"))
    for name, values in jax.items():
        expected = np.float32 if name == "pixel_values" else np.int32
        assert values.dtype == expected
        np.testing.assert_array_equal(values, numpy[name])
    assert numpy.pixel_values.shape == (1, 1, 4, 3, TILE, TILE)
    assert numpy.cross_attention_mask.shape == (1, 13, 1, 4)
    assert {str(numpy[name].dtype) for name in numpy} == {"int64", "float32"}


def test_text_or_images_alone(processor):
    text = processor(text=["hello there", "hi"], padding=True, return_tensors="np")
    assert list(text) == ["input_ids", "attention_mask"]
    assert text.input_ids.tolist() == [[128000, 15339, 1070], [128000, 6151, 128004]]
    for nothing in (None, [], [[], []]):
        again = processor(images=nothing, text=["hello there", "hi"], padding=True)
        assert list(again) == ["input_ids", "attention_mask"]
    images = processor([[picture()], []], return_tensors="np")
    assert list(images) == ["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"]
    assert images.aspect_ratio_ids.tolist() == [[1], [0]]
    chat = processor.apply_chat_template(user("hi"), tokenize=True, return_dict=True)
    assert list(chat) == ["input_ids", "attention_mask"]
    ids = processor.apply_chat_template(user(picture(), "hi"), tokenize=True, return_tensors="np")
    assert isinstance(ids, np.ndarray)


# --- BOS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", f"{BOS}a"),
        ("", BOS),
        (f"{BOS}a", f"{BOS}a"),
        (f"a{BOS}", f"a{BOS}"),
        (f"{IMAGE}a", f"{IMAGE}{BOS}a"),
        (f"{IMAGE}{IMAGE} {IMAGE}", f"{IMAGE}{IMAGE}{BOS} {IMAGE}"),
        (f"{BOS}{IMAGE}a", f"{BOS}{IMAGE}a"),
    ],
)
def test_bos_comes_once(processor, text, expected):
    images = [picture()] * text.count(IMAGE)
    for options in ({}, {"add_special_tokens": False}):
        ids = processor(images=images, text=text, **options).input_ids[0]
        assert processor.decode(ids) == expected


def test_bos_comes_once_where_the_tokenizer_adds_it(processor_folder, processor):
    tokenizer = MllamaTokenizer.from_pretrained(processor_folder)
    own = MllamaProcessor(processor.image_processor, tokenizer)
    added = {"single": f"{BOS} $A", "special_tokens": [(BOS, 128000), ("<|eot_id|>", 128009)]}
    tokenizer.backend.post_processor = processors.TemplateProcessing(**added)
    assert tokenizer.encode("a") == [128000, 64]
    assert own(images=picture(), text=HAIKU).input_ids == [HAIKU_IDS]
    assert own(text=f"{BOS}a").input_ids == [[128000, 64]]
    added["single"] = "$A <|eot_id|>"
    tokenizer.backend.post_processor = processors.TemplateProcessing(**added)
    assert own(text="a").input_ids == [[128000, 64, 128009]]
    added["single"] = f"{BOS} $A <|eot_id|>"
    tokenizer.backend.post_processor = processors.TemplateProcessing(**added)
    with pytest.raises(
        ValueError, match=r"'<\|eot_id\|>'\] by itself, and BOS must not come twice"
    ):
        own(text="a")
    assert own(text="a", add_special_tokens=False).input_ids == [[128000, 64]]


# --- batches --------------------------------------------------------------------------------------

TEXTS = ["<|image|>one", "none at all", "a<|image|><|image|>b <|image|> c", "<|image|>"]
IMAGES = [[picture(WIDE)], [], [picture(TALL), picture(), picture(WIDE, 9)], [picture(TALL)]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_sample_is_the_same_alone_and_in_a_batch(processor, side):
    batch = processor(IMAGES, TEXTS, padding=True, padding_side=side, return_tensors="np")
    length = batch.input_ids.shape[1]
    assert batch.cross_attention_mask.shape == (4, length, 3, 4)
    for i, (images, text) in enumerate(zip(IMAGES, TEXTS, strict=True)):
        alone = processor(images, text, return_tensors="np")
        size = alone.input_ids.shape[1]
        real = slice(0, size) if side == "right" else slice(length - size, length)
        np.testing.assert_array_equal(batch.input_ids[i, real], alone.input_ids[0])
        assert batch.attention_mask[i].sum() == batch.attention_mask[i, real].sum() == size
        mask = batch.cross_attention_mask[i]
        if side == "left":
            assert not mask[: length - size].any()
        count = len(images)
        if not count:
            assert not mask.any()
            assert not batch.pixel_values[i].any()
            continue
        np.testing.assert_array_equal(mask[real, :count], alone.cross_attention_mask[0])
        np.testing.assert_array_equal(batch.pixel_values[i, :count], alone.pixel_values[0])
        np.testing.assert_array_equal(batch.aspect_ratio_ids[i, :count], alone.aspect_ratio_ids[0])
        assert not mask[:, count:].any()
        assert not batch.aspect_ratio_ids[i, count:].any()


def test_the_mask_itself(processor):
    text = f"{BOS}a<|image|><|image|>b<|image|>c"
    images = [picture(TALL), picture(), picture(WIDE)]
    inputs = processor(images, text, padding="max_length", max_length=9, return_tensors="np")
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[0])
    assert tokens[:7] == [BOS, "a", IMAGE, IMAGE, "b", IMAGE, "c"]
    first, second, third = [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]
    none = [0, 0, 0, 0]
    assert inputs.cross_attention_mask[0].tolist() == [
        [none, none, none],
        [none, none, none],
        [first, none, none],
        [first, second, none],
        [first, second, none],
        [none, none, third],
        [none, none, third],
        [none, none, third],
        [none, none, third],
    ]
    assert image_spans([1, 9, 9, 1, 9], 9) == [(1, 4), (2, 4), (4, 5)]
    assert image_spans([9, 9, 9], 9) == [(0, 3), (1, 3), (2, 3)]
    assert image_spans([1, 2], 9) == []


def test_a_flat_list_is_dealt_out(processor):
    flat = [image for sample in IMAGES for image in sample]
    nested, dealt = (
        processor(images, TEXTS, padding=True, return_tensors="np") for images in (IMAGES, flat)
    )
    assert_same(nested, dealt)
    arrays = np.stack([np.asarray(picture()), np.asarray(picture())])
    one = processor(arrays, "<|image|>a<|image|>", return_tensors="np")
    two = processor([arrays[:1], arrays[1:]], ["<|image|>a", "<|image|>a"], return_tensors="np")
    dealt = processor(arrays, ["<|image|>a", "<|image|>a"], return_tensors="np")
    assert one.aspect_ratio_ids.shape == (1, 2)
    assert_same(two, dealt)


def test_lists_of_different_lengths(processor):
    inputs = processor(IMAGES, TEXTS)
    lengths = [len(row) for row in inputs.input_ids]
    assert len(set(lengths)) > 1
    assert inputs.cross_attention_mask.shape == (4, max(lengths), 3, 4)


# --- options --------------------------------------------------------------------------------------


def test_options_flat_and_in_groups(processor):
    flat = processor(
        picture(WIDE), HAIKU, padding="max_length", max_length=20, do_rescale=False,
        return_tensors="np",
    )  # fmt: skip
    grouped = processor(
        picture(WIDE),
        HAIKU,
        images_kwargs={"do_rescale": False},
        text_kwargs={"padding": "max_length", "max_length": 20},
        common_kwargs={"return_tensors": "np"},
    )
    assert_same(flat, grouped)
    assert flat.input_ids.shape == (1, 20)
    assert flat.pixel_values.max() > 100
    size = {"height": 14, "width": 14}
    documented = processor(
        images=picture(),
        text=[HAIKU],
        images_kwargs={"size": size},
        text_kwargs={"padding": "right"},
        common_kwargs={"return_tensors": "np"},
    )
    assert documented.pixel_values.shape == (1, 1, 4, 3, 14, 14)
    assert processor(picture(), HAIKU, text_kwargs={"return_tensors": "np"}).input_ids.ndim == 2


def test_fewer_tiles_for_a_call(processor):
    inputs = processor(picture(WIDE), HAIKU, max_image_tiles=2, return_tensors="np")
    assert inputs.pixel_values.shape[2] == 2
    assert inputs.aspect_ratio_mask.shape == (1, 1, 2)
    assert inputs.cross_attention_mask.shape == (1, 13, 1, 2)


def test_special_tokens_of_a_conversation_stay_text_unless_asked_for(processor):
    chat = user("is <|image|> one?", picture())
    options = {"tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(chat, **options)
    assert inputs.input_ids[0].count(128256) == 1
    assert inputs.pixel_values.shape[1] == 1
    with pytest.raises(ValueError, match=r"sample 0 has 2 <\|image\|> in its text and 1 images"):
        processor.apply_chat_template(chat, **options, allow_special_tokens=True)
    prompt = processor.apply_chat_template(chat)
    assert processor(picture(), prompt).input_ids == inputs.input_ids
    both = processor([picture()] * 2, prompt, allow_special_tokens=True)
    assert both.input_ids[0].count(128256) == 2


def test_where_a_conversation_has_its_pictures(processor, tmp_path):
    file = tmp_path / "a picture.png"
    picture().save(file)
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    places = [
        {"image": picture()},
        {"image": np.asarray(picture())},
        {"image": buffer.getvalue()},
        {"image": file, "url": None},
        {"path": str(file)},
        {"url": file.as_uri()},
        {"url": f"data:image/png;base64,{encoded}"},
        {"base64": encoded},
    ]
    chats = [[{"role": "user", "content": [{"type": "image"} | place]}] for place in places]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "np"}
    inputs = processor.apply_chat_template(chats, **options)
    assert (inputs.pixel_values == inputs.pixel_values[:1]).all()
    assert inputs.pixel_values.any()
    places = [({}, "no picture"), ({"path": "a", "url": "b"}, r"\['path', 'url'\]")]
    places += [({"base64": "?"}, "base64 is broken"), ({"url": "http://a/b.png"}, "downloaded")]
    places += [({"path": str(tmp_path / "c")}, "image 0 of sample 0 .*no such file")]
    for place, message in places:
        chat = [{"role": "user", "content": [{"type": "image"} | place]}]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            processor.apply_chat_template(chat, **options)


# --- files ----------------------------------------------------------------------------------------


def test_round_trip(processor, tmp_path):
    settings = processor.image_processor.to_dict() | {"max_image_tiles": 3, "mine": [1]}
    image_processor = MllamaImageProcessor.from_dict(settings)
    template = "own {{ messages[0].content }}"
    MllamaProcessor(image_processor, processor.tokenizer, template).save_pretrained(tmp_path)
    again = MllamaProcessor.from_pretrained(tmp_path)
    assert again.image_processor == image_processor
    assert again.tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map
    assert again.apply_chat_template([{"role": "user", "content": "x"}]) == "own x"
    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "MllamaProcessor"
    assert theirs.chat_template == template
    assert theirs.image_processor.max_image_tiles == 3
    given = {"images": picture(TALL), "text": HAIKU, "return_tensors": "np"}
    assert_same(again(**given), theirs(**given))


def test_where_the_templates_come_from(small, tmp_path):
    small.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("chat_template*"))
    assert MllamaProcessor.from_pretrained(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert MllamaProcessor.from_pretrained(tmp_path).chat_template == "from json"
    given = MllamaProcessor.from_pretrained(tmp_path, chat_template="given")
    assert given.chat_template == "given"
    templates = {"default": "d", "tool_use": "t"}
    own = MllamaProcessor(small.image_processor, small.tokenizer, templates)
    own.save_pretrained(tmp_path)
    again = MllamaProcessor.from_pretrained(tmp_path)
    assert again.chat_template == templates
    messages = [{"role": "user", "content": "x"}]
    assert again.apply_chat_template(messages) == "d"
    assert again.apply_chat_template(messages, tools=[{}]) == "t"


def test_overrides(processor_folder, tmp_path):
    processor = MllamaProcessor.from_pretrained(
        processor_folder, padding_side="left", size={"height": 14, "width": 14}, eos_token="<x>"
    )
    assert processor.tokenizer.padding_side == "left"
    assert processor.image_processor.size["height"] == 14
    assert processor.tokenizer.eos_token == "<x>"
    with pytest.raises(
        TypeError, match=r"no options \['paddingside'\]; did you mean .*padding_side"
    ):
        MllamaProcessor.from_pretrained(processor_folder, paddingside="left")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        MllamaProcessor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json: no such file"):
        MllamaProcessor.from_pretrained(tmp_path)


def test_decoding(processor):
    ids = np.array([[128000, 6151, 128009], [15339, 1070, 128004]])
    assert processor.post_process_image_text_to_text(ids) == ["hi", "hello there"]
    assert processor.post_process_image_text_to_text(ids[0]) == ["hi"]
    assert processor.batch_decode(ids)[0] == f"{BOS}hi<|eot_id|>"
    assert processor.decode(ids[1], skip_special_tokens=True) == "hello there"


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (None, None, "neither text nor images"),
        (None, [], "text is an empty list"),
        (None, HAIKU, r"sample 0 has 1 <\|image\|> in its text and 0 images"),
        ("pic", "no token", r"sample 0 has 0 <\|image\|> in its text and 1 images"),
        (["pic"] * 2, HAIKU, "sample 0 has 1 .* and 2 images"),
        ([["pic"]], [HAIKU, HAIKU], "2 texts and lists of images for 1"),
        ([["pic"], []], [HAIKU, HAIKU], "sample 1 has 1 .* and 0 images"),
        ([["pic"], ["pic"]], [HAIKU, "b"], "sample 1 has 0 .* and 1 images"),
        (
            [[], ["pic"] * 2],
            [HAIKU, HAIKU],
            r"sample 0 has 1 .*0 images; sample 1 has 1 .*2 images",
        ),
        (["pic"], [HAIKU, "b", HAIKU], r"1 images in a flat list, and the texts have \[1, 0, 1\]"),
        (["pic", ["pic"]], [HAIKU, HAIKU], "mixes images and lists of images"),
        ([["pic"], [b"x"]], [HAIKU, HAIKU], r"image 0 of sample 1 .*not a picture"),
    ],
    ids=str,
)
def test_images_and_texts_that_do_not_match(processor, images, text, message):
    def replace(item):
        return [replace(i) for i in item] if isinstance(item, list) else real.get(item, item)

    real = {"pic": picture()}
    with pytest.raises(ValueError, match=message):
        processor(images=replace(images), text=text, padding=True)


def test_truncation_never_takes_an_image(processor):
    images = [[picture()], [picture(), picture()]]
    texts = ["<|image|>hello there", "<|image|>hello there<|image|>"]
    options = {"truncation": True, "padding": True, "return_tensors": "np"}
    with pytest.raises(ValueError, match=r"sample 1: its text has 2 .*its ids have 1 .*max_length"):
        processor(images, texts, max_length=3, **options)
    with pytest.raises(ValueError, match=r"sample 0: .* truncation cut off images"):
        processor(picture(), f"hello there{HAIKU}", max_length=3, truncation=True)
    cut = processor(images[:1], texts[:1], max_length=3, **options)
    assert cut.input_ids.tolist() == [[128256, 128000, 15339]]
    with pytest.raises(ValueError, match="split_special_tokens"):
        processor(picture(), HAIKU, split_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paddin": True}, r"no options \['paddin'\]; did you mean \['padding'\]"),
        ({"images_kwargs": {"padding": True}}, r"images_kwargs knows no options \['padding'\]"),
        ({"common_kwargs": {"xyz": 1}}, r"known are \['allow_special_tokens', 'return_tensors'\]"),
        ({"padding": True, "text_kwargs": {"padding": False}}, "in text_kwargs and beside it"),
        (
            {"text_kwargs": {"return_tensors": "np"}, "images_kwargs": {"return_tensors": "jax"}},
            "return_tensors is 'np' in text_kwargs and 'jax' elsewhere",
        ),
    ],
    ids=str,
)
def test_options_that_nothing_knows(processor, options, message):
    with pytest.raises(TypeError, match=message):
        processor(text="a", **options)


def test_things_that_are_no_text_and_tokenizers_without_images(processor):
    with pytest.raises(TypeError, match=r"text is a Image"):
        processor("a", picture())
    with pytest.raises(ValueError, match=r"have \[3, 2\] tokens.*padding=True"):
        processor(text=["hello there", "hi"], return_tensors="np")
    with pytest.raises(ValueError, match="'pt'"):
        processor(text="hi", return_tensors="pt")
    with pytest.raises(ValueError, match="no image token"):
        MllamaProcessor(processor.image_processor, word_tokenizer())
