"""From whatever a caller calls an image to an upright 8-bit Pillow picture."""

import base64
import binascii
import io
import os
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mllama_jax.processing.image_arrays import picture_of, to_channels_last, to_uint8

MAX_PIXELS = 2**27
"""Largest picture read from a file, in pixels (134 million, 512 MiB once decoded).

Checked on the header, before anything is decoded. A file of a few kilobytes can claim any size.
"""

MAX_SIDE = 2**24
"""Longest side of a picture read from a file, in pixels.

Resizing needs a table of 16 bytes for each pixel along a side: 256 MiB for this one.
"""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_EIGHT_BIT_MODES = ("L", "LA", "RGB", "RGBA")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?")


class Picture(NamedTuple):
    """An 8-bit picture (mode L, LA, RGB or RGBA), ready to be resized."""

    image: Image.Image
    unit_range: bool
    """It came as an array of fractions in [0, 1]: pixel value 255 stands for 1.0."""


def load_image(source: Any, *, where: str = "image") -> Image.Image:
    """An image from any supported source as an upright RGB Pillow picture.

    See `load_picture`, which this calls, for the sources and for what is raised.
    """
    return load_picture(source, where=where).image


def load_picture(
    source: Any,
    *,
    where: str = "image",
    convert_rgb: bool = True,
    input_data_format: str | None = None,
) -> Picture:
    """Read, check, turn upright and reduce to 8 bits one image.

    Files and Pillow images are turned as their EXIF orientation says. Of an animation the first
    frame is taken (of a Pillow image, the frame it stands at). Of a 16-bit grey picture (Pillow
    modes "I;16", and "I" with values up to 65535) each value is divided by 257 and rounded: the
    exact inverse of widening 8 bits to 16 (65535 becomes 255), where dropping the low byte would
    darken by half a step. Mode "F" may hold fractions in [0, 1] or values in [0, 255].
    With `convert_rgb`, transparency is composited on white and everything becomes RGB.

    Arrays may be (height, width), or have 1, 3 or 4 (RGBA) channels, first or last, and hold
    integers (or whole floats) in [0, 255], fractions in [0, 1], or booleans (True is white).

    Args:
        source: a Pillow image, an array (NumPy, JAX or anything NumPy can read), a path (an
            `etils.epath.Path` may lie in the cloud), a `file://` or `data:` URL, or the bytes of
            an image file.
        where: how errors call the image, such as "image 2 of sample 1".
        convert_rgb: make the picture RGB; otherwise modes L, LA, RGB and RGBA are kept and others
            are refused.
        input_data_format: "channels_first", "channels_last" or "none" (height, width), for arrays
            only. None infers: an axis of 3, else 4, else 1 holds the channels, the first axis
            where both could.

    Raises:
        FileNotFoundError, OSError: the file can't be opened.
        ValueError: not a picture, damaged, too large (`MAX_PIXELS`, `MAX_SIDE`), empty, values or
            a shape that can't be understood, or a URL that would need a network.
        TypeError: no kind of image at all.
    """
    label = f"{where} ({_describe(source)})"
    if isinstance(source, Image.Image):
        image = _decode(source, label)
    elif isinstance(source, str):
        image = _from_string(source, label)
    elif isinstance(source, os.PathLike):
        image = _from_path(source, label)
    elif isinstance(source, bytes | bytearray | memoryview):
        image = _from_file(io.BytesIO(source), label)
    elif hasattr(source, "__array__"):
        channels_last = to_channels_last(np.asarray(source), input_data_format, label)
        pixels, unit_range = to_uint8(channels_last, label)
        return Picture(_convert(picture_of(pixels), convert_rgb, label), unit_range)
    else:
        raise TypeError(
            f"{label}: expected a Pillow image, an array, a path, a file: or data: URL or bytes; "
            "a sample without images is an empty list"
        )
    return Picture(_convert(_reduce_depth(image, label), convert_rgb, label), False)


# --- files ---------------------------------------------------------------------------------------


def _from_string(text: str, label: str) -> Image.Image:
    scheme = _SCHEME.match(text)
    kind = scheme[1].lower() if scheme else ""
    if kind == "data":
        return _from_file(io.BytesIO(_data_url_bytes(text, label)), label)
    if kind == "file":
        parts = urllib.parse.urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(
                f"{label}: a file URL on the host {parts.netloc!r} can't be read; expected "
                "file:///path"
            )
        return _from_path(Path(urllib.request.url2pathname(parts.path)), label)
    if scheme and (scheme[2] or kind in ("http", "https")):
        raise ValueError(
            f"{label}: nothing is downloaded here; download the picture first and pass its path "
            "or its bytes, or wrap an address in cloud storage in etils.epath.Path"
        )
    return _from_path(Path(text), label)


def _from_path(path: os.PathLike, label: str) -> Image.Image:
    # A path-like that opens itself may live in the cloud (etils.epath).
    opener = path if hasattr(path, "open") else Path(path)
    try:
        file = opener.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{label}: no such file (relative paths start at {os.getcwd()}); check the path, or "
            "pass encoded pictures as bytes or as a data: URL"
        ) from error
    except OSError as error:
        raise type(error)(f"{label}: can't be opened: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{label}: not a usable path: {error}") from error
    with file:
        return _from_file(file, label)


def _data_url_bytes(url: str, label: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise ValueError(f"{label}: a data URL without a comma; expected data:image/…;base64,…")
    data = urllib.parse.unquote_to_bytes(body)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{label}: the data URL's base64 is broken: {error}") from error


def _from_file(file: Any, label: str) -> Image.Image:
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(16)
        found = f"it starts with {start!r}" if start else "it is empty"
        raise ValueError(
            f"{label}: not a picture in a format that Pillow reads: {found}; convert it to PNG or "
            "JPEG, or leave it out"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_large(label, str(error))) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins let anything escape on malformed headers
        raise ValueError(f"{label}: its header is damaged: {_short(error)}") from error
    return _decode(image, label)


def _too_large(label: str, found: str) -> str:
    return (
        f"{label}: too large to decode safely: {found}; the limits are {MAX_PIXELS} pixels and "
        f"{MAX_SIDE} along a side; shrink the picture first, or decode it yourself and pass an "
        "array"
    )


def _decode(image: Image.Image, label: str) -> Image.Image:
    """Load a picture's pixels and turn it upright."""
    width, height = image.size
    if isinstance(image, ImageFile.ImageFile):
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ValueError(_too_large(label, f"its header says {width} x {height} pixels"))
        if image.format == "EPS":  # decoding one would run Ghostscript on untrusted input
            raise ValueError(f"{label}: PostScript is not decoded; convert it to PNG first")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file raises depends on Pillow's plugin
        raise ValueError(
            f"{label}: its pixels can't be read, the file is truncated or damaged: "
            f"{_short(error)}; fetch or write it again, or leave it out"
        ) from error
    if 0 in image.size:
        raise ValueError(f"{label}: a picture of {width} x {height} pixels is empty")
    return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    # Only after load(): some plugins (TIFF) turn the picture themselves and drop the tag then.
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata must not cost a good picture
        return image
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    # Pillow copies metadata to derived pictures: without this a second call would turn again.
    for key in _ORIENTATION_METADATA:
        turned.info.pop(key, None)
    return turned


# --- depth and colour ----------------------------------------------------------------------------


def _reduce_depth(image: Image.Image, label: str) -> Image.Image:
    """Bring grey modes of more (or fewer) than 8 bits to mode L; leave other modes as they are."""
    if image.mode == "1":
        return image.convert("L")
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError(f"{label}: mode {image.mode} with NaN or infinite values")
    low, high = values.min(), values.max()
    # Pillow scales 16-bit PGM to the full range of 65535, however dark the picture.
    sixteen_bits = image.mode.startswith("I;16") or image.format == "PPM" or high > 255
    if image.mode != "F" and sixteen_bits and low >= 0 and high <= 65535:
        values = (values.astype(np.uint32) + 128) // 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        values = np.rint(values * 255)
    elif not (low >= 0 and high <= 255):
        expected = "[0, 1] or [0, 255]" if image.mode == "F" else "[0, 65535]"
        raise ValueError(
            f"{label}: mode {image.mode} with values in [{low}, {high}]; expected values in "
            f"{expected}: rescale them first"
        )
    return Image.fromarray(values.astype(np.uint8))


def _convert(image: Image.Image, convert_rgb: bool, label: str) -> Image.Image:
    if not convert_rgb:
        if image.mode not in _EIGHT_BIT_MODES:
            raise ValueError(
                f"{label}: mode {image.mode} with do_convert_rgb=False; expected one of "
                f"{', '.join(_EIGHT_BIT_MODES)}: pass do_convert_rgb=True"
            )
        return image
    if image.mode == "RGB":
        return image
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    except ValueError as error:
        raise ValueError(f"{label}: mode {image.mode} has no way to RGB: {error}") from error


# --- lists ----------------------------------------------------------------------------------------


def nest_images(images: Any) -> list[list[Any]]:
    """One image, one sample's images, or a batch of samples, as a list of lists of images.

    A flat list is one sample; an array with four dimensions is a list of images.

    Source: transformers 4.54.1, image_utils.py: make_nested_list_of_images; samples may be empty.

    Raises:
        ValueError: nothing at all, or images and samples side by side.
    """
    if not isinstance(images, list | tuple):
        return [list(images) if _is_stack(images) else [images]]
    if not images:
        raise ValueError(
            "images is empty; pass at least one sample ([[]] is a batch of one sample without "
            "images)"
        )
    if all(_is_stack(sample) or isinstance(sample, list | tuple) for sample in images):
        return [list(sample) for sample in images]
    if nested := [i for i, item in enumerate(images) if isinstance(item, list | tuple)]:
        raise ValueError(
            f"images mixes images and lists of images (lists at {nested} of {len(images)}); pass "
            "one list of images for each sample, such as [[first, second], [third], []]"
        )
    return [list(images)]


def _is_stack(images: Any) -> bool:
    return hasattr(images, "__array__") and getattr(images, "ndim", None) == 4


# --- words for errors ----------------------------------------------------------------------------


def _describe(source: Any) -> str:
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "")
        return f"{_short(name)!r}" if name else f"Pillow image, {source.mode}, {source.size}"
    if isinstance(source, str | os.PathLike):
        return repr(_short(os.fspath(source)))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return f"array of {source.dtype} {tuple(source.shape)}"
    return f"{type(source).__name__}: {_short(repr(source))}"


def _short(what: Any, limit: int = 200) -> str:
    text = str(what) or type(what).__name__
    return text if len(text) <= limit else f"{text[:limit]}…"
