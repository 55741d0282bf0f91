"""The image processor: equal to transformers' where that is right, and right where it is not."""

import io
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from transformers.models.mllama.image_processing_mllama import (
    MllamaImageProcessor as ReferenceImageProcessor,
)

from mllama_jax import MllamaImageProcessor, MllamaVisionConfig
from mllama_jax.processing.batch_feature import BatchFeature

TILE = 28
SIZE = {"height": TILE, "width": TILE}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SETTINGS = {"size": SIZE, **CLIP}
MODES = ("RGB", "RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "I", "F")

PROCESSOR = MllamaImageProcessor(**SETTINGS)
BLACK = [-mean / std for mean, std in zip(*CLIP.values(), strict=True)]


def random_side(rng: np.random.Generator) -> int:
    """From one pixel to many tiles, half of them at or beside a multiple of the tile size."""
    if rng.random() < 0.5:
        return max(int(rng.integers(0, 6)) * TILE + int(rng.integers(-1, 2)), 1)
    return int(np.exp(rng.uniform(0, np.log(500))))


def random_pixels(rng: np.random.Generator, channels: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (random_side(rng), random_side(rng), channels), np.uint8)


def random_picture(rng: np.random.Generator) -> Image.Image:
    mode = MODES[rng.integers(len(MODES))]
    return Image.fromarray(random_pixels(rng, 4)).convert(mode)


def random_samples(rng: np.random.Generator, make) -> list[list]:
    """Samples of one to three images, as transformers accepts them."""
    return [[make(rng) for _ in range(rng.integers(1, 4))] for _ in range(20)]


def assert_same(ours: BatchFeature, reference) -> None:
    assert set(ours) == set(reference)
    assert ours["num_tiles"] == reference["num_tiles"]
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        np.testing.assert_array_equal(ours[name], reference[name], err_msg=name)
        assert ours[name].dtype == np.int64
    assert ours["pixel_values"].dtype == np.float32
    np.testing.assert_allclose(ours["pixel_values"], reference["pixel_values"], rtol=0, atol=1e-6)


def compare(images, constructor=SETTINGS, **call) -> None:
    """Both processors on the same images; the settings at construction and at the call."""
    reference = ReferenceImageProcessor(**constructor)(images, return_tensors="np", **call)
    assert_same(MllamaImageProcessor(**constructor)(images, **call), reference)


# --- equal to the reference ----------------------------------------------------------------------


@pytest.mark.parametrize("max_image_tiles", range(1, 7))
def test_pictures_of_all_modes_and_sizes(max_image_tiles):
    rng = np.random.default_rng(max_image_tiles)
    samples = random_samples(rng, random_picture)
    compare(samples, {**SETTINGS, "max_image_tiles": max_image_tiles})


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_arrays_of_bytes_and_whole_numbers(dtype, channels_first):
    def make(rng: np.random.Generator) -> np.ndarray:
        pixels_HWC = random_pixels(rng).astype(dtype)
        return pixels_HWC.transpose(2, 0, 1) if channels_first else pixels_HWC

    layout = "channels_first" if channels_first else "channels_last"
    samples = random_samples(np.random.default_rng(7), make)
    compare(samples, input_data_format=layout)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_of_fractions(dtype):
    def make(rng: np.random.Generator) -> np.ndarray:
        return (random_pixels(rng) / 256 + 0.001).astype(dtype)

    samples = random_samples(np.random.default_rng(8), make)
    compare(samples, do_rescale=False, input_data_format="channels_last")


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_resampling_filters(resample):
    rng = np.random.default_rng(9)
    compare(random_samples(rng, random_picture)[:3], {**SETTINGS, "resample": resample})


@pytest.mark.parametrize(
    "changes",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": [0.5, 1, 2]},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"size": {"height": 56, "width": 56}},
        {"size": {"height": 13, "width": 13}, "max_image_tiles": 2},
        {"resample": 0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_arguments_at_construction_and_at_the_call(changes):
    rng = np.random.default_rng(10)
    samples = random_samples(rng, lambda rng: Image.fromarray(random_pixels(rng)))[:4]
    compare(samples, {**SETTINGS, **changes})
    compare(samples, SETTINGS, **changes)
    before = PROCESSOR.to_dict()
    PROCESSOR(samples[0], **changes)
    assert PROCESSOR.to_dict() == before


def test_defaults_are_the_reference_defaults():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 300, 3), np.uint8))
    compare(picture, {})
    ours, reference = MllamaImageProcessor().to_dict(), ReferenceImageProcessor().to_dict()
    assert ours == {name: reference[name] for name in ours}


@pytest.mark.parametrize("size", [448, 560])
def test_released_tile_sizes(size):
    rng = np.random.default_rng(size)
    picture = Image.fromarray(rng.integers(0, 256, (600, 900, 3), np.uint8))
    compare(picture, {**CLIP, "size": {"height": size, "width": size}})


@pytest.mark.parametrize("shape", [(1, 1), (1, 9_999_999), (9_999_999, 1)])
def test_extreme_shapes(shape):
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, shape, np.uint8))
    compare(picture)
    ids = {(1, 1): 1, (1, 9_999_999): 4, (9_999_999, 1): 8}
    assert PROCESSOR(picture).aspect_ratio_ids == [[ids[shape]]]


def test_flat_and_nested_lists_and_stacks():
    rng = np.random.default_rng(11)
    pictures = [random_picture(rng) for _ in range(3)]
    compare(pictures[0])
    compare(pictures)
    compare([pictures[:2], pictures[2:]])
    stack = rng.integers(0, 256, (3, 20, 40, 3), np.uint8)
    compare(stack)
    compare([stack, stack[:2]])
    compare([list(stack), [stack[0]]])


# --- literal expectations ------------------------------------------------------------------------


def test_padding_in_a_tile_is_black_and_missing_tiles_are_zero():
    white = Image.new("RGB", (TILE + 2, TILE // 2), "white")
    batch = PROCESSOR(white)
    assert batch.pixel_values.shape == (1, 1, 4, 3, TILE, TILE)
    assert batch.num_tiles == [[2]]
    for channel, (mean, std) in enumerate(zip(*CLIP.values(), strict=True)):
        tiles = batch.pixel_values[0, 0, :, channel]
        np.testing.assert_allclose(tiles[0, : TILE // 2], (1 - mean) / std, rtol=1e-6)
        np.testing.assert_allclose(tiles[1, : TILE // 2, :2], (1 - mean) / std, rtol=1e-6)
        np.testing.assert_allclose(tiles[0, TILE // 2 :], BLACK[channel], rtol=1e-6)
        np.testing.assert_allclose(tiles[1, :, 2:], BLACK[channel], rtol=1e-6)
        np.testing.assert_array_equal(tiles[2:], 0)


def test_samples_without_images_beside_samples_with():
    """transformers refuses `[[image], []]` and crashes on `[[], []]`."""
    picture = Image.new("RGB", (TILE, 3 * TILE), "red")
    batch = PROCESSOR([[], [picture, picture], [picture]])
    assert batch.num_tiles == [[], [3, 3], [3]]
    np.testing.assert_array_equal(batch.aspect_ratio_ids, [[0, 0], [7, 7], [7, 0]])
    present, missing = [1, 1, 1, 0], [1, 0, 0, 0]
    np.testing.assert_array_equal(
        batch.aspect_ratio_mask,
        [[missing, missing], [present, present], [present, missing]],
    )
    alone = PROCESSOR(picture).pixel_values[0, 0]
    np.testing.assert_array_equal(batch.pixel_values[1], [alone, alone])
    np.testing.assert_array_equal(batch.pixel_values[2, 0], alone)
    np.testing.assert_array_equal(batch.pixel_values[0], 0)
    np.testing.assert_array_equal(batch.pixel_values[2, 1], 0)


def test_batch_without_any_image():
    batch = PROCESSOR([[], []])
    assert batch.pixel_values.shape == (2, 0, 4, 3, TILE, TILE)
    assert batch.aspect_ratio_ids.shape == (2, 0)
    assert batch.aspect_ratio_mask.shape == (2, 0, 4)
    assert batch.num_tiles == [[], []]


def test_sixteen_bit_grey_equals_its_eight_bit_picture():
    grey = np.random.default_rng(12).integers(0, 256, (TILE, TILE), np.uint8)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(
        PROCESSOR(sixteen).pixel_values, PROCESSOR(Image.fromarray(grey)).pixel_values
    )


def test_phone_photo_is_turned_before_it_is_tiled():
    stored = Image.fromarray(
        np.random.default_rng(13).integers(0, 256, (TILE, 3 * TILE, 3), np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: turn clockwise
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    turned = PROCESSOR(file.getvalue())
    assert turned.aspect_ratio_ids == [[7]]
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(turned.pixel_values, PROCESSOR(upright).pixel_values)


def test_pictures_and_arrays_of_any_layout_in_one_batch(tmp_path):
    picture = Image.fromarray(np.random.default_rng(14).integers(0, 256, (40, 50, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    pixels = np.asarray(picture)
    batch = PROCESSOR([[picture, pixels], [pixels.transpose(2, 0, 1), str(tmp_path / "a.png")]])
    values = batch.pixel_values.reshape(4, 4, 3, TILE, TILE)
    np.testing.assert_array_equal(values, np.stack([values[0]] * 4))


def test_grey_and_transparent_arrays_become_rgb():
    grey = np.full((30, 40), 90, np.uint8)
    rgb = PROCESSOR(np.stack([grey] * 3, axis=-1)).pixel_values
    for array in (grey, grey[..., None], grey[None], np.stack([grey] * 3 + [grey * 0 + 255])):
        np.testing.assert_array_equal(PROCESSOR(array).pixel_values, rgb)
    transparent = np.zeros((30, 40, 4), np.uint8)
    white = PROCESSOR(Image.new("RGB", (40, 30), "white")).pixel_values
    np.testing.assert_array_equal(PROCESSOR(transparent).pixel_values, white)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_are_kept_without_conversion(channels):
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    picture = Image.fromarray(np.full((TILE, TILE, channels), 255, np.uint8).squeeze(), mode)
    batch = PROCESSOR(picture, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    assert batch.pixel_values.shape == (1, 1, 4, channels, TILE, TILE)
    np.testing.assert_array_equal(batch.pixel_values[0, 0, 0], 1)


def test_fractions_that_are_rescaled_again_raise_a_warning():
    fractions = np.full((TILE, TILE, 3), 0.5, np.float32)
    with pytest.warns(UserWarning, match=r"image 1 of sample 0: .*pass do_rescale=False") as caught:
        PROCESSOR([Image.new("RGB", (5, 5)), fractions])
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="do_rescale=False"):
        dark = PROCESSOR(fractions, do_normalize=False).pixel_values
    np.testing.assert_allclose(dark[0, 0, 0], 127 / 255 / 255, rtol=1e-6)


def test_jax_arrays():
    picture = Image.fromarray(np.random.default_rng(15).integers(0, 256, (40, 50, 3), np.uint8))
    ours, host = PROCESSOR(picture, return_tensors="jax"), PROCESSOR(picture, return_tensors="np")
    assert ours.num_tiles == host.num_tiles
    for name, dtype in (
        ("pixel_values", jnp.float32),
        ("aspect_ratio_ids", jnp.int32),
        ("aspect_ratio_mask", jnp.int32),
    ):
        assert isinstance(ours[name], jax.Array)
        assert ours[name].dtype == dtype
        assert isinstance(host[name], np.ndarray)
        np.testing.assert_array_equal(ours[name], host[name])


# --- resize and pad ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "fractions"])
@pytest.mark.parametrize("input_data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("data_format", [None, "channels_first", "channels_last"])
def test_resize_and_pad_equal_the_reference(kind, input_data_format, data_format):
    reference = ReferenceImageProcessor(**SETTINGS)
    rng = np.random.default_rng(16)
    for _ in range(4):
        image = random_pixels(rng)
        if kind == "fractions":
            image = (image / 256 + 0.001).astype(np.float32)
        if input_data_format == "channels_first":
            image = image.transpose(2, 0, 1)
        formats = {"input_data_format": input_data_format, "data_format": data_format}
        expected, ratio = reference.resize(image, SIZE, 4, **formats)
        resized, aspect_ratio = PROCESSOR.resize(image, SIZE, 4, **formats)
        assert aspect_ratio == tuple(ratio)
        assert resized.dtype == expected.dtype
        np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-7)

        formats["input_data_format"] = data_format or input_data_format
        padded = PROCESSOR.pad(resized, SIZE, aspect_ratio, **formats)
        expected = reference.pad(expected, SIZE, ratio, **formats)
        assert padded.dtype == expected.dtype
        np.testing.assert_allclose(padded, expected, rtol=0, atol=1e-7)


def test_pad_as_documented():
    image = np.ones((3, 100, 400), np.int16)
    padded = MllamaImageProcessor().pad(image, {"height": 224, "width": 224}, (1, 2))
    assert padded.shape == (3, 224, 448)
    assert padded.dtype == np.int16
    assert padded.sum() == image.sum() == padded[:, :100, :400].sum()


def test_pad_of_an_image_larger_than_its_canvas():
    with pytest.raises(ValueError, match=r"29 x 10 pixels .* canvas of 28 x 56 .*resize it first"):
        PROCESSOR.pad(np.zeros((29, 10, 3)), SIZE, (1, 2))


def test_resize_of_grey_arrays():
    resized, aspect_ratio = PROCESSOR.resize(np.full((60, 20), 7, np.uint8), SIZE, 4)
    assert aspect_ratio == (3, 1)
    assert resized.shape == (60, 20)
    resized, _ = PROCESSOR.resize(np.full((1, 60, 20), 7, np.uint8), SIZE, 4)
    assert resized.shape == (1, 60, 20)


def test_unknown_layout_of_the_result():
    with pytest.raises(ValueError, match="data_format='HWC'"):
        PROCESSOR.pad(np.zeros((5, 5, 3)), SIZE, (1, 1), data_format="HWC")


# --- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"do_resize": False},
        {"do_pad": False},
        {"do_rescale": 1},
        {"do_normalize": "yes"},
        {"do_convert_rgb": "RGB"},
        {"size": {"height": 28, "width": 56}},
        {"size": {"height": 0, "width": 0}},
        {"size": {"height": 28.0, "width": 28.0}},
        {"size": {"shortest_edge": 28}},
        {"size": 28},
        {"resample": 17},
        {"resample": True},
        {"resample": "bilinear"},
        {"rescale_factor": float("nan")},
        {"rescale_factor": "1/255"},
        {"image_mean": "0.5"},
        {"image_mean": []},
        {"image_mean": [0.5, None, 0.5]},
        {"image_std": [1.0, 0.0, 1.0]},
        {"image_std": float("inf")},
        {"max_image_tiles": 0},
        {"max_image_tiles": -1},
        {"max_image_tiles": 4.0},
        {"max_image_tiles": True},
    ],
    ids=str,
)
def test_bad_arguments_are_named(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}=.*: expected"):
        MllamaImageProcessor(**bad)
    with pytest.raises(ValueError, match=f"{name}=.*: expected"):
        PROCESSOR(Image.new("RGB", (5, 5)), **bad)


def test_all_bad_arguments_are_named_together():
    with pytest.raises(ValueError, match=r"size=.*; max_image_tiles=0.*; image_std="):
        MllamaImageProcessor(size={}, max_image_tiles=0, image_std=0)


def test_unknown_arguments():
    with pytest.raises(TypeError, match="do_crop"):
        MllamaImageProcessor(do_crop=True)
    with pytest.raises(TypeError, match="do_crop"):
        PROCESSOR(Image.new("RGB", (5, 5)), do_crop=True)


@pytest.mark.parametrize("kind", ["pt", "tf", "list"])
def test_other_kinds_of_tensors(kind):
    with pytest.raises(ValueError, match=f"return_tensors='{kind}': expected None, 'np' or 'jax'"):
        PROCESSOR(Image.new("RGB", (5, 5)), return_tensors=kind)


def test_means_for_another_number_of_channels():
    with pytest.raises(ValueError, match="image_mean has 3 values, but the image has 1 channels"):
        PROCESSOR(Image.new("L", (5, 5)), do_convert_rgb=False)
    with pytest.raises(ValueError, match="image_std has 2 values, but the image has 3 channels"):
        PROCESSOR(Image.new("RGB", (5, 5)), image_std=[1, 2])


def test_images_of_different_numbers_of_channels():
    images = [[Image.new("RGB", (5, 5))], [Image.new("L", (5, 5))]]
    with pytest.raises(ValueError, match="image 0 of sample 0 has 3, image 0 of sample 1 has 1"):
        PROCESSOR(images, do_convert_rgb=False)


def test_unreadable_images_are_named_together():
    good = Image.new("RGB", (5, 5))
    with pytest.raises(FileNotFoundError, match=r"image 1 of sample 0 \('nowhere.png'\)"):
        PROCESSOR([[good, "nowhere.png"], [good]])
    with pytest.raises(ValueError, match="3 images can't be used") as caught:
        PROCESSOR([[good, "nowhere.png"], [b"junk", good, None]])
    for where in ("image 1 of sample 0", "image 0 of sample 1", "image 2 of sample 1"):
        assert where in str(caught.value)


# --- files ---------------------------------------------------------------------------------------


def test_save_and_read(tmp_path):
    processor = MllamaImageProcessor(
        size={"height": np.int64(56), "width": 56},
        image_mean=np.array([0.5, 0.25, 0.125], np.float32),
        image_std=np.float32(0.5),
        rescale_factor=np.float32(0.5),
        max_image_tiles=np.int32(2),
        resample=Image.Resampling.BICUBIC,
        extra={"processor_class": "MllamaProcessor", "nested": {"a": [1]}},
    )
    file = processor.save_pretrained(tmp_path / "deep" / "folder")
    assert file == epath.Path(tmp_path / "deep" / "folder" / "preprocessor_config.json")
    assert MllamaImageProcessor.from_pretrained(tmp_path / "deep" / "folder") == processor
    assert MllamaImageProcessor.from_pretrained(file) == processor
    assert json.loads(file.read_text()) == processor.to_dict()
    assert processor.to_dict()["nested"] == {"a": [1]}


def test_reference_reads_ours_and_we_read_the_reference(tmp_path):
    picture = Image.fromarray(np.random.default_rng(17).integers(0, 256, (40, 90, 3), np.uint8))
    PROCESSOR.save_pretrained(tmp_path)
    reference = ReferenceImageProcessor.from_pretrained(tmp_path)
    assert_same(PROCESSOR(picture), reference(picture, return_tensors="np"))

    reference = ReferenceImageProcessor(**{**SETTINGS, "max_image_tiles": 3, "resample": 3})
    reference.save_pretrained(tmp_path)
    ours = MllamaImageProcessor.from_pretrained(tmp_path)
    assert_same(ours(picture), reference(picture, return_tensors="np"))
    assert ours.to_dict() == json.loads((tmp_path / "preprocessor_config.json").read_text())


def test_overrides_on_reading(tmp_path):
    PROCESSOR.save_pretrained(tmp_path)
    read = MllamaImageProcessor.from_pretrained(tmp_path, max_image_tiles=2)
    assert read.max_image_tiles == 2
    assert read.size == SIZE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"max_image_tiles": 0}', "max_image_tiles=0"),
        ('{"image_processor_type": "CLIPImageProcessor"}', "another model"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{message}"):
        MllamaImageProcessor.from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json: no such file"):
        MllamaImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MllamaImageProcessor.from_pretrained(tmp_path / "nowhere")


def test_fast_and_extra_fields_of_released_files():
    values = {
        "image_processor_type": "MllamaImageProcessorFast",
        "size": SIZE,
        "processor_class": "MllamaProcessor",
    }
    processor = MllamaImageProcessor.from_dict(values)
    assert processor.extra == {"processor_class": "MllamaProcessor"}
    assert processor.to_dict()["processor_class"] == "MllamaProcessor"
    assert processor.to_dict()["image_processor_type"] == "MllamaImageProcessor"
    with pytest.raises(ValueError, match=r"extra=.*found \['size'\]"):
        MllamaImageProcessor(extra={"size": SIZE})


# --- what it is ----------------------------------------------------------------------------------


def test_processor_is_immutable_and_hashable():
    with pytest.raises(AttributeError):
        PROCESSOR.max_image_tiles = 2
    with pytest.raises(ValueError, match="immutable"):
        PROCESSOR.size["height"] = 56
    assert hash(PROCESSOR) == hash(MllamaImageProcessor(**SETTINGS))
    assert MllamaImageProcessor() != PROCESSOR


def test_output_fits_the_default_vision_config():
    ids = MllamaImageProcessor(size=SIZE)(Image.new("RGB", (TILE, 4 * TILE))).aspect_ratio_ids
    assert ids.max() == len(MllamaVisionConfig().supported_aspect_ratios)


def test_batches_are_mappings_with_attributes_and_pytrees():
    batch = PROCESSOR(Image.new("RGB", (5, 5)))
    assert batch.pixel_values is batch["pixel_values"]
    assert set({**batch}) == set(MllamaImageProcessor.model_input_names)
    assert "pixel_values" in dir(batch)
    with pytest.raises(AttributeError, match="no field 'labels' in this batch; it has"):
        _ = batch.labels
    with pytest.raises(AttributeError):
        batch.labels = 1
    doubled = jax.tree.map(lambda leaf: leaf * 2, batch)
    assert isinstance(doubled, BatchFeature)
    np.testing.assert_array_equal(doubled.aspect_ratio_ids, [[2]])
    assert doubled.num_tiles == [[2]]


def test_nothing_warns_on_ordinary_pictures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PROCESSOR([Image.new("RGB", (5, 5)), np.zeros((5, 5, 3), np.float32)])
