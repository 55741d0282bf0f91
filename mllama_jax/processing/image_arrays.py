"""Image arrays: where their channels are, their values as bytes, and what bytes become."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

_CHANNEL_PREFERENCE = (3, 4, 1)


def channel_axis(
    shape: tuple[int, ...], input_data_format: str | None, label: str = "image"
) -> int | None:
    """The axis of an image array's shape that holds the channels; None for (height, width).

    Raises:
        ValueError: not the shape of an image with 1, 3 or 4 channels in the given format, or empty.
    """
    axes_of = {"channels_first": (0,), "channels_last": (2,), "none": (), None: (0, 2)}
    wanted = getattr(input_data_format, "value", input_data_format)
    if wanted not in axes_of:
        raise ValueError(
            f"input_data_format={input_data_format!r}: expected 'channels_first', "
            "'channels_last' or 'none'"
        )
    if 0 in shape:
        raise ValueError(f"{label}: an image of shape {shape} is empty")
    if len(shape) == 2:
        return None
    if len(shape) == 3:
        for channels in _CHANNEL_PREFERENCE:
            for axis in axes_of[wanted]:
                if shape[axis] == channels:
                    return axis
    raise ValueError(
        f"{label}: shape {shape} with input_data_format={wanted!r}; expected (height, width), "
        "(channels, height, width) or (height, width, channels) with 1, 3 or 4 channels"
    )


def to_channels_last(array: np.ndarray, input_data_format: str | None, label: str) -> np.ndarray:
    """A view (height, width) or (height, width, channels) of an image array."""
    axis = channel_axis(array.shape, input_data_format, label)
    return array if axis is None else np.moveaxis(array, axis, -1)


def to_uint8(array: np.ndarray, label: str = "image") -> tuple[np.ndarray, bool]:
    """An image array as uint8, and whether it held fractions in [0, 1] (then scaled by 255).

    Source: transformers 4.54.1, image_transforms.py: to_pil_image (truncating, not rounding).

    Raises:
        ValueError: NaN or infinite values, or values in neither range.
        TypeError: not numbers.
    """
    if array.dtype == np.uint8:
        return array, False
    if array.dtype == bool:
        return array.astype(np.uint8) * 255, False
    if array.dtype.kind == "V":  # bfloat16 and the like, which JAX adds to NumPy
        array = array.astype(np.float32)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{label}: an array of dtype {array.dtype}; expected integers or floats")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{label}: the array holds NaN or infinite values")
    whole = array.dtype.kind in "iu" or np.allclose(array, np.trunc(array))
    if whole and low >= 0 and high <= 255:
        return array.astype(np.uint8), False
    if not whole and low >= 0 and high <= 1:
        return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8), True
    raise ValueError(
        f"{label}: {'whole' if whole else 'fractional'} values in [{low}, {high}]; expected "
        "integers in [0, 255] or fractions in [0, 1]: rescale the array first (16-bit pictures: "
        "divide by 257), and undo any normalisation"
    )


def picture_of(pixels: np.ndarray) -> Image.Image:
    """A uint8 array (height, width) or (height, width, 1, 3 or 4) as a Pillow image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def to_layout(image: np.ndarray, axis: int | None, data_format: str | None) -> np.ndarray:
    """Move the channels of a channels-last array to `data_format`, by default to `axis`."""
    wanted = getattr(data_format, "value", data_format)
    if wanted not in (None, "channels_first", "channels_last", "none"):
        raise ValueError(
            f"data_format={data_format!r}: expected 'channels_first' or 'channels_last'"
        )
    if image.ndim == 2 or wanted == "none":
        return image
    first = axis == 0 if wanted is None else wanted == "channels_first"
    return np.ascontiguousarray(np.moveaxis(image, -1, 0)) if first else image


def value_table(
    channels: int,
    *,
    rescale_factor: float | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    unit_range: bool = False,
) -> np.ndarray:
    """What each of the 256 pixel values becomes: float32 (C, 256).

    Computed with the roundings of the reference (scaling in float64, then float32; normalisation
    in float32), so that looking values up is exact as well as fast.

    Source: transformers 4.54.1, image_transforms.py: rescale, normalize.

    Args:
        channels: C.
        rescale_factor: factor for every value; None leaves values from 0 to 255.
        mean: subtracted, one number or one for each channel; with `std`, None leaves both out.
        std: divides.
        unit_range: 255 stands for 1.0 before any of this.

    Raises:
        ValueError: not as many means or standard deviations as channels.
    """
    table = np.arange(256, dtype=np.float64)
    if unit_range:
        table = (table * (1 / 255)).astype(np.float32).astype(np.float64)
    if rescale_factor is not None:
        table = table * rescale_factor
    table_C256 = np.tile(table.astype(np.float32), (channels, 1))
    if mean is None or std is None:
        return table_C256
    return (table_C256 - _column("image_mean", mean, channels)) / _column(
        "image_std", std, channels
    )


def _column(name: str, values: float | Sequence[float], channels: int) -> np.ndarray:
    if isinstance(values, Sequence) and len(values) != channels:
        raise ValueError(
            f"{name} has {len(values)} values, but the image has {channels} channels; pass one "
            "number, or one for each channel"
        )
    return np.broadcast_to(np.asarray(values, np.float32), (channels,))[:, None]
