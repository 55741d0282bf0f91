"""Whatever a caller calls an image becomes an upright 8-bit picture, or an error that says why."""

import base64
import io
import struct
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from mllama_jax.processing import image_loading
from mllama_jax.processing.image_loading import load_image, load_picture, nest_images

PIXELS_HWC = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS_HWC)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixels(source, **kwargs) -> np.ndarray:
    image = load_image(source, **kwargs)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


# --- sources -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a picture, 100% ü.png"
    path.write_bytes(encode(PICTURE))
    return path


@pytest.mark.parametrize(
    "source",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: epath.Path(path),
        lambda path: path.as_uri(),
        lambda path: path.as_uri().replace("file://", "FILE://localhost"),
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        lambda path: "data:;base64," + base64.encodebytes(path.read_bytes()).decode(),
        lambda path: "data:image/png," + "".join(f"%{byte:02x}" for byte in path.read_bytes()),
        lambda path: Image.open(path),
        lambda path: PICTURE,
        lambda path: PIXELS_HWC,
        lambda path: jnp.asarray(PIXELS_HWC),
    ],
    ids=[
        *("path", "str", "epath", "file-url", "file-url-host", "bytes", "bytearray", "memoryview"),
        *("data-url", "data-url-lines", "data-url-percent", "opened", "pillow", "numpy", "jax"),
    ],
)
def test_every_source_gives_the_same_picture(file, source):
    np.testing.assert_array_equal(pixels(source(file)), PIXELS_HWC)


def test_relative_paths_start_at_the_working_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    np.testing.assert_array_equal(pixels(file.name), PIXELS_HWC)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "TGA"])
def test_lossless_file_formats(file_format):
    data = encode(PICTURE, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    np.testing.assert_array_equal(pixels(data), PIXELS_HWC)


# --- modes ---------------------------------------------------------------------------------------


def test_transparency_is_composited_on_white():
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 128))
    np.testing.assert_array_equal(pixels(rgba), [[[255, 255, 255], [132, 137, 142]]])
    np.testing.assert_array_equal(pixels(np.asarray(rgba)), pixels(rgba))
    np.testing.assert_array_equal(pixels(encode(rgba)), pixels(rgba))


def test_palette_with_and_without_a_transparent_entry():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encode(palette)), [[[255, 0, 0], [0, 0, 255]]])
    see_through = encode(palette, transparency=1)
    np.testing.assert_array_equal(pixels(see_through), [[[255, 0, 0], [255, 255, 255]]])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("LA", (77, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", (90, 128, 128), (90, 90, 90)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I", 77, (77, 77, 77)),
        ("I", 77 * 257, (77, 77, 77)),
        ("F", 77.0, (77, 77, 77)),
        ("F", 0.5, (128, 128, 128)),
    ],
)
def test_colour_modes(mode, colour, expected):
    np.testing.assert_array_equal(pixels(Image.new(mode, (1, 1), colour)), [[expected]])


@pytest.mark.parametrize(("lightness", "expected"), [(0, 0), (137, 127), (255, 255)])
def test_lab_is_not_taken_for_transparent(lightness, expected):
    """Through RGBA, as the reference goes, it becomes white. The profile rounds to 1 of 255."""
    lab = Image.merge("LAB", [Image.new("L", (2, 1), value) for value in (lightness, 128, 128)])
    assert np.abs(pixels(lab).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_shades(file_format):
    """Converted naively everything above 255 becomes white."""
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image = Image.fromarray(shades)
    assert image.mode == "I;16"
    expected = np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2)
    np.testing.assert_array_equal(pixels(image), expected)
    np.testing.assert_array_equal(pixels(encode(image, file_format)), expected)
    np.testing.assert_array_equal(pixels(Image.fromarray(shades.astype(np.int32))), expected)


def test_dark_sixteen_bit_grey_stays_dark():
    dark = Image.fromarray(np.array([[0, 100, 128, 129, 255]], np.uint16))
    np.testing.assert_array_equal(pixels(dark)[0, :, 0], [0, 0, 0, 1, 1])


def test_big_endian_sixteen_bit_grey():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 77 * 257, 65535))
    np.testing.assert_array_equal(pixels(image)[0, :, 0], [77, 255])


def test_sixteen_bit_pgm_is_as_bright_as_it_says():
    data = b"P5 2 1 1000\n" + struct.pack(">2H", 1000, 500)
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [255, 128])
    dark = b"P5 2 1 65535\n" + struct.pack(">2H", 255, 100)
    np.testing.assert_array_equal(pixels(dark)[0, :, 0], [1, 0])


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    np.testing.assert_array_equal(pixels(data), np.asarray(frames[0]))


def test_opened_animation_stands_where_its_caller_left_it():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animation = Image.open(
        io.BytesIO(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    )
    animation.seek(1)
    np.testing.assert_array_equal(pixels(animation), np.asarray(frames[1]))


def test_without_conversion_modes_are_kept_or_refused():
    for mode in ("L", "LA", "RGB", "RGBA"):
        assert load_picture(Image.new(mode, (2, 2)), convert_rgb=False).image.mode == mode
    with pytest.raises(ValueError, match="mode CMYK with do_convert_rgb=False"):
        load_picture(Image.new("CMYK", (2, 2)), convert_rgb=False)


# --- orientation ---------------------------------------------------------------------------------

# What a viewer shows for the stored picture [[0, 1, 2], [3, 4, 5]] under each EXIF orientation.
UPRIGHT = {
    1: [[0, 1, 2], [3, 4, 5]],
    2: [[2, 1, 0], [5, 4, 3]],
    3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]],
    6: [[3, 0], [4, 1], [5, 2]],
    7: [[5, 2], [4, 1], [3, 0]],
    8: [[2, 5], [1, 4], [0, 3]],
    9: [[0, 1, 2], [3, 4, 5]],  # not an orientation
}


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_once(orientation, file_format):
    stored = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(stored, file_format, exif=exif, **options)
    expected = np.array(UPRIGHT[orientation]) * 40
    upright = load_image(data)
    np.testing.assert_array_equal(np.asarray(upright)[..., 0], expected)
    np.testing.assert_array_equal(pixels(upright)[..., 0], expected)  # not turned again


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint16, np.float32, np.float64])
def test_whole_numbers_of_any_type(dtype):
    np.testing.assert_array_equal(pixels(PIXELS_HWC.astype(dtype)), PIXELS_HWC)
    np.testing.assert_array_equal(pixels(PIXELS_HWC.transpose(2, 0, 1).astype(dtype)), PIXELS_HWC)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_fractions_are_recognised(dtype):
    picture = load_picture(np.array([[0.0, 0.5, 1.0]]).astype(dtype))
    assert picture.unit_range
    np.testing.assert_array_equal(np.asarray(picture.image)[0, :, 0], [0, 127, 255])


def test_booleans_are_black_and_white():
    picture = load_picture(np.array([[True, False]]))
    assert not picture.unit_range
    np.testing.assert_array_equal(np.asarray(picture.image)[0, :, 0], [255, 0])


@pytest.mark.parametrize(
    ("shape", "input_data_format", "size"),
    [
        ((6, 9), None, (9, 6)),
        ((6, 9), "none", (9, 6)),
        ((6, 9, 1), None, (9, 6)),
        ((1, 6, 9), None, (9, 6)),
        ((6, 9, 3), None, (9, 6)),
        ((3, 6, 9), None, (9, 6)),
        ((6, 9, 4), None, (9, 6)),
        ((4, 6, 9), None, (9, 6)),
        ((1, 9, 3), None, (9, 1)),  # 3 channels rather than 1
        ((4, 9, 3), None, (9, 4)),  # 3 channels rather than 4
        ((3, 9, 3), None, (3, 9)),  # the first axis where both could
        ((3, 9, 3), "channels_last", (9, 3)),
        ((3, 3, 9), "channels_first", (9, 3)),
        ((4, 9, 3), "channels_first", (3, 9)),
    ],
)
def test_layouts_of_arrays(shape, input_data_format, size):
    image = load_image(np.zeros(shape, np.uint8))
    assert image.mode == "RGB"
    picture = load_picture(np.zeros(shape, np.uint8), input_data_format=input_data_format)
    assert picture.image.size == size


def test_data_format_does_not_apply_to_pictures():
    picture = load_picture(PICTURE, input_data_format="channels_first")
    np.testing.assert_array_equal(np.asarray(picture.image), PIXELS_HWC)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 6, 2)), r"shape \(5, 6, 2\).*expected \(height, width\)"),
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((2, 5, 6, 3)), r"shape \(2, 5, 6, 3\)"),
        (np.zeros((0, 6, 3)), "is empty"),
        (np.full((2, 2), np.nan), "NaN or infinite"),
        (np.full((2, 2), -1), r"whole values in \[-1, -1\]"),
        (np.full((2, 2), 256), r"whole values in \[256, 256\]; expected integers in \[0, 255\]"),
        (np.array([[0.5, 2.0]]), r"fractional values in \[0.5, 2.0\]"),
        (np.array([[-0.5, 0.5]]), "fractional values .* undo any normalisation"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_arrays_of_anything_but_numbers():
    with pytest.raises(TypeError, match="dtype complex128"):
        load_image(np.zeros((2, 2), complex))


def test_unknown_data_format():
    with pytest.raises(ValueError, match="input_data_format='HWC': expected 'channels_first'"):
        load_picture(PIXELS_HWC, input_data_format="HWC")


# --- what can't be read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height"), [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (2**24 + 1, 1)]
)
def test_bombs_are_refused_before_decoding(width, height):
    data = png_that_claims(width, height)
    assert len(data) < 100
    with pytest.raises(ValueError, match=r"image \(\d+ bytes\): too large to decode safely"):
        load_image(data)


def test_limit_holds_for_pictures_opened_by_the_caller(monkeypatch):
    monkeypatch.setattr(image_loading, "MAX_PIXELS", 34)
    with pytest.raises(ValueError, match="its header says 7 x 5 pixels; the limits are 34 pixels"):
        load_image(Image.open(io.BytesIO(encode(PICTURE))))
    load_image(PICTURE)  # decoded already


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a picture in a format that Pillow reads: it is empty"),
        (b"<html>Not found</html>", "not a picture .* it starts with b'<html>Not found<'"),
        (encode(PICTURE)[:60], "truncated or damaged"),
        (encode(PICTURE.resize((64, 64)), "JPEG")[:-50], "truncated or damaged"),
        (encode(PICTURE, "TIFF")[:20], "not a picture|damaged"),
        (encode(PICTURE, "GIF")[:12], "not a picture|damaged"),
        (encode(PICTURE, "EPS"), "PostScript is not decoded"),
    ],
)
def test_files_that_are_no_pictures(data, message):
    with pytest.raises(ValueError, match=f"photo .*{message}"):
        load_image(data, where="photo")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere/cat.png", FileNotFoundError, "'nowhere/cat.png'.*no such file .*relative paths"),
        ("file:///nowhere/cat.png", FileNotFoundError, "no such file"),
        ("/", OSError, "can't be opened"),
        ("", OSError, "image"),
        ("a\0b", ValueError, "not a usable path"),
        ("file://server/cat.png", ValueError, "on the host 'server'"),
        ("https://example.com/cat.png", ValueError, "nothing is downloaded here"),
        ("HTTP:example.com", ValueError, "nothing is downloaded here"),
        ("gs://bucket/cat.png", ValueError, "nothing is downloaded here.*etils.epath.Path"),
        ("data:image/png;base64", ValueError, "without a comma"),
        ("data:image/png;base64,%%%", ValueError, "base64 is broken"),
        ("data:image/png;base64,aGFsbG8=", ValueError, "starts with b'hallo'"),
        (None, TypeError, "NoneType.*a sample without images is an empty list"),
        (3, TypeError, "int: 3"),
        ([PICTURE], TypeError, "list"),
    ],
)
def test_sources_that_are_no_images(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source)


def test_long_sources_are_cut_in_errors():
    with pytest.raises(ValueError, match="base64 is broken") as caught:
        load_image("data:image/png;base64," + "?" * 100_000)
    assert len(str(caught.value)) < 500


# --- lists ---------------------------------------------------------------------------------------


def test_nesting():
    a, b, c = (Image.new("RGB", (1, size)) for size in (1, 2, 3))
    assert nest_images(a) == [[a]]
    assert nest_images("cat.png") == [["cat.png"]]
    assert nest_images([a, b]) == [[a, b]]  # one sample
    assert nest_images((a, "b.png")) == [[a, "b.png"]]
    assert nest_images([[a, b], [c]]) == [[a, b], [c]]
    assert nest_images([[a], []]) == [[a], []]
    assert nest_images([[], []]) == [[], []]
    assert nest_images([(a,), [b]]) == [[a], [b]]


def test_nesting_of_stacked_arrays():
    stack = np.zeros((2, 5, 7, 3), np.uint8)
    assert [[image.shape for image in sample] for sample in nest_images(stack)] == [[(5, 7, 3)] * 2]
    assert [len(sample) for sample in nest_images([stack, stack[:1]])] == [2, 1]
    assert [len(sample) for sample in nest_images([stack, []])] == [2, 0]
    assert nest_images(stack[0])[0][0].shape == (5, 7, 3)


def test_lists_that_mix_levels():
    with pytest.raises(ValueError, match=r"lists at \[0, 2\] of 3"):
        nest_images([[PICTURE], PICTURE, []])
    with pytest.raises(ValueError, match="images is empty"):
        nest_images([])
