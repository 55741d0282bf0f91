"""Whether the image processor's arguments can be used."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

_SWITCHES = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad")


def argument_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with `MllamaImageProcessor`'s arguments, one line each; [] if nothing is.

    Args:
        values: every argument by name, `image_mean` and `image_std` as a number or a tuple.
    """
    expected: dict[str, str] = {}
    for name in _SWITCHES:
        if not isinstance(values[name], bool):
            expected[name] = "True or False"
    for name in ("do_resize", "do_pad"):
        if values[name] is False:
            expected[name] = "True: images are always resized and padded onto tiles"
    size = values["size"]
    is_square = isinstance(size, Mapping) and set(size) == {"height", "width"}
    if not (is_square and _is_count(size["height"]) and size["height"] == size["width"]):
        expected["size"] = '{"height": s, "width": s} with one positive integer s'
    if not _is_count(values["max_image_tiles"]):
        expected["max_image_tiles"] = "a positive integer"
    filters = [item.value for item in Image.Resampling]
    if isinstance(values["resample"], bool) or values["resample"] not in filters:
        expected["resample"] = f"one of PIL.Image.Resampling, {filters}"
    if not is_number(values["rescale_factor"]):
        expected["rescale_factor"] = "a finite number"
    for name in ("image_mean", "image_std"):
        items = values[name] if isinstance(values[name], tuple) else (values[name],)
        if not items or not all(map(is_number, items)):
            expected[name] = "a finite number, or one for each channel"
    if "image_std" not in expected and 0 in np.atleast_1d(values["image_std"]):
        expected["image_std"] = "no zeros"
    if known := sorted(set(values["extra"]) & set(values)):
        expected["extra"] = f"no arguments of the constructor (found {known})"
    return [f"{name}={_plain(values[name])!r}: expected {what}" for name, what in expected.items()]


def _plain(value: Any) -> Any:
    """A frozen mapping as a dict, which prints on one line."""
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, of Python or NumPy, and not a boolean."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0
