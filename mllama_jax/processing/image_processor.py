"""From pictures to the tiles that the vision encoder reads."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.core import FrozenDict
from PIL import Image

from mllama_jax.processing.batch_feature import BatchFeature
from mllama_jax.processing.image_arrays import (
    channel_axis,
    picture_of,
    to_channels_last,
    to_layout,
    to_uint8,
)
from mllama_jax.processing.image_checks import argument_problems, is_number
from mllama_jax.processing.image_fitting import (
    FittedImage,
    fit_images,
    pack_images,
    resize_to_tiles,
)
from mllama_jax.processing.image_loading import nest_images
from mllama_jax.processing.tiling import Arrangement, aspect_ratio_ids, aspect_ratio_mask

CONFIG_NAME = "preprocessor_config.json"

_TYPE_FIELD = "image_processor_type"


@dataclass(frozen=True)
class MllamaImageProcessor:
    """Turns pictures into tiles, tile masks and aspect-ratio ids. Immutable; every call is pure.

    Each picture is made upright 8-bit RGB, resized onto the arrangement of tiles that suits it
    best, padded with black at the bottom and right, rescaled, normalised and cut into tiles.
    Called like a function (`processor(images, …)`) it does what `preprocess` does.

    Args:
        do_convert_rgb: bring every picture, arrays too, to RGB, transparency on white. Off, a
            picture keeps its 1 to 4 channels, and all pictures of a call need the same number.
        do_resize: must be True, as in transformers.
        size: tile size, `{"height": s, "width": s}`. None means 224; the released models use 448
            and 560, and the vision config's `image_size` must agree.
        resample: a `PIL.Image.Resampling` filter.
        do_rescale: multiply pixel values (0 to 255) by `rescale_factor`.
        rescale_factor: 1/255 by default.
        do_normalize: subtract `image_mean`, then divide by `image_std`.
        image_mean: one number, or one for each channel. None means 0.5.
        image_std: likewise.
        do_pad: must be True, as in transformers.
        max_image_tiles: most tiles for a picture, and tile slots (L) in the output. The vision
            config's `max_num_tiles` must agree, for the ids depend on it.
        extra: fields of a `preprocessor_config.json` that mean nothing here; saved as they came.

    Differences from transformers, all on purpose:
        - EXIF orientation is applied; a picture already turned by hand must have lost its tag.
        - Pictures with more than 8 bits of grey are rescaled, not clipped to white, and Lab
          pictures are not taken for transparent, which made them white.
        - Paths, URLs of files, bytes, grey and RGBA arrays and samples without images are taken.
        - `do_convert_rgb` is obeyed per call and for arrays.
        - Limits on the size of files (`image_loading.MAX_PIXELS`) and errors, instead of pictures
          silently wrong.

    Source: transformers 4.54.1, image_processing_mllama.py: MllamaImageProcessor.

    Raises:
        ValueError: unusable arguments; all of them are named.
    """

    do_convert_rgb: bool = True
    do_resize: bool = True
    size: Mapping[str, int] | None = None
    resample: int = Image.Resampling.BILINEAR
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | Sequence[float] | None = None
    image_std: float | Sequence[float] | None = None
    do_pad: bool = True
    max_image_tiles: int = 4
    extra: Mapping[str, Any] = field(default_factory=FrozenDict)

    model_input_names: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "num_tiles",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
    )

    def __post_init__(self) -> None:
        self._set(
            size=_frozen({"height": 224, "width": 224} if self.size is None else self.size),
            image_mean=_per_channel(self.image_mean),
            image_std=_per_channel(self.image_std),
            extra=_frozen(self.extra),
        )
        if problems := argument_problems(self._arguments()):
            raise ValueError("MllamaImageProcessor: " + "; ".join(problems))
        # Plain numbers, whatever NumPy type they had: they are written as JSON.
        tile_size = int(self._tile_size)
        self._set(
            size=FrozenDict(height=tile_size, width=tile_size),
            resample=Image.Resampling(self.resample),
            rescale_factor=float(self.rescale_factor),
            max_image_tiles=int(self.max_image_tiles),
        )

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        do_convert_rgb: bool | None = None,
        do_resize: bool | None = None,
        size: Mapping[str, int] | None = None,
        resample: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_pad: bool | None = None,
        max_image_tiles: int | None = None,
        input_data_format: str | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Preprocess a batch of samples with any number of images each.

        Args:
            images: one image; a list of images (one sample); or a list of such lists (one for each
                sample), in which samples may be empty. An array (N, height, width, channels) or
                (N, channels, height, width) is a sample of N images, a list of such arrays a
                batch. `mllama_jax.processing.image_loading.load_picture` says what an image may be.
            input_data_format: layout of array images: "channels_first", "channels_last" or "none"
                (height, width); None infers it from each array's shape.
            return_tensors: None or "np" for NumPy arrays, "jax" for JAX arrays.

        The other arguments stand in for the processor's own where they are not None.

        Returns:
            M is the largest number of images of a sample (0 where there are none at all), C is 3
            with `do_convert_rgb`. Integers are int64 in NumPy and int32 in JAX.

            - pixel_values float32 (B, M, L, C, s, s); exact zeros where there is no tile;
            - aspect_ratio_ids (B, M): 1-based, 0 where there is no image;
            - aspect_ratio_mask (B, M, L): 1 for a tile, and for the first slot of every image,
              present or not;
            - num_tiles: for each sample, a list with each image's number of tiles.

        Raises:
            ValueError, TypeError, OSError: unusable arguments, or images that can't be read; all
                such images are named ("image 2 of sample 1", counted from 0).

        Warns:
            UserWarning: an array of fractions in [0, 1] is rescaled as if it held 0 to 255, which
                transformers does too and which leaves it nearly black; pass `do_rescale=False`.
        """
        settings = self._with(
            do_convert_rgb=do_convert_rgb,
            do_resize=do_resize,
            size=size,
            resample=resample,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_pad=do_pad,
            max_image_tiles=max_image_tiles,
        )
        tensors = _tensor_kind(return_tensors)
        layout = {"tile_size": settings._tile_size, "max_image_tiles": settings.max_image_tiles}
        samples = fit_images(
            nest_images(images),
            resample=settings.resample,
            convert_rgb=settings.do_convert_rgb,
            input_data_format=input_data_format,
            **layout,
        )
        if settings.do_rescale:
            _warn_of_fractions(samples, settings.rescale_factor)
        pixel_values = pack_images(
            samples,
            rescale_factor=settings.rescale_factor if settings.do_rescale else None,
            mean=settings.image_mean if settings.do_normalize else None,
            std=settings.image_std if settings.do_normalize else None,
            **layout,
        )
        arrangements = [[image.arrangement for image in sample] for sample in samples]
        ids = aspect_ratio_ids(arrangements, settings.max_image_tiles)
        mask = aspect_ratio_mask(arrangements, settings.max_image_tiles)
        batch = BatchFeature(
            pixel_values=pixel_values, aspect_ratio_ids=ids, aspect_ratio_mask=mask
        )
        if tensors == "jax":
            batch = BatchFeature(
                pixel_values=jnp.asarray(pixel_values),
                aspect_ratio_ids=jnp.asarray(ids, jnp.int32),
                aspect_ratio_mask=jnp.asarray(mask, jnp.int32),
            )
        batch["num_tiles"] = [[h * w for h, w in sample] for sample in arrangements]
        return batch

    def resize(
        self,
        image: np.ndarray,
        size: Mapping[str, int],
        max_image_tiles: int,
        resample: int = Image.Resampling.BILINEAR,
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> tuple[np.ndarray, Arrangement]:
        """Resize an image array to fit the arrangement of tiles that suits it best.

        Args:
            image: (height, width) or 1, 3 or 4 channels first or last; values as for `preprocess`.
            size: tile size, `{"height": s, "width": s}`.
            max_image_tiles: most tiles to use.
            resample: a `PIL.Image.Resampling` filter.
            data_format: layout of the result; None keeps the image's.
            input_data_format: layout of the image; None infers it.

        Returns:
            The resized image (uint8, or float32 in [0, 1] if the image held fractions) and the
            arrangement `(tiles_h, tiles_w)`.
        """
        settings = self._with(size=size, max_image_tiles=max_image_tiles, resample=resample)
        image = np.asarray(image)
        pixels, unit_range = to_uint8(to_channels_last(image, input_data_format, "image"))
        resized, arrangement = resize_to_tiles(
            picture_of(pixels),
            tile_size=settings._tile_size,
            max_image_tiles=settings.max_image_tiles,
            resample=settings.resample,
        )
        result = np.asarray(resized)
        if unit_range:
            result = (result * np.float64(1 / 255)).astype(np.float32)
        axis = channel_axis(image.shape, input_data_format)
        if axis is not None and result.ndim == 2:
            result = result[..., None]
        return to_layout(result, axis, data_format), arrangement

    def pad(
        self,
        image: np.ndarray,
        size: Mapping[str, int],
        aspect_ratio: Arrangement,
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> np.ndarray:
        """Pad an image array with zeros at the bottom and right to `size` x `aspect_ratio`.

        With size 224 and aspect ratio (1, 2) the result is 224 high and 448 wide.

        Args:
            image: (height, width) or 1, 3 or 4 channels first or last, any dtype.
            size: tile size, `{"height": s, "width": s}`.
            aspect_ratio: tiles (down, across).
            data_format: layout of the result; None keeps the image's.
            input_data_format: layout of the image; None infers it.

        Raises:
            ValueError: the image is larger than its canvas.
        """
        tile_size = self._with(size=size)._tile_size
        image = np.asarray(image)
        axis = channel_axis(image.shape, input_data_format)
        pixels = to_channels_last(image, input_data_format, "image")
        height, width = aspect_ratio[0] * tile_size, aspect_ratio[1] * tile_size
        missing = (height - pixels.shape[0], width - pixels.shape[1])
        if min(missing) < 0:
            raise ValueError(
                f"an image of {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width) does "
                f"not fit its canvas of {height} x {width} (aspect_ratio={tuple(aspect_ratio)}, "
                f"tiles of {tile_size}); resize it first"
            )
        widths = [(0, missing[0]), (0, missing[1]), (0, 0)][: pixels.ndim]
        return to_layout(np.pad(pixels, widths), axis, data_format)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a processor from a `preprocessor_config.json`'s contents; others go to `extra`.

        Raises:
            ValueError: unusable values, or another model's image processor.
        """
        kind = values.get(_TYPE_FIELD)
        if kind is not None and not str(kind).startswith("MllamaImageProcessor"):
            raise ValueError(
                f"{_TYPE_FIELD} is {kind!r}, expected 'MllamaImageProcessor': this is the "
                "configuration of another model"
            )
        own = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        known = {name: value for name, value in values.items() if name in own}
        extra = {name: value for name, value in values.items() if name not in own | {_TYPE_FIELD}}
        return cls(**known, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `preprocessor_config.json`."""
        values = self._arguments()
        extra: dict[str, Any] = FrozenDict(values.pop("extra")).unfreeze()
        values["size"] = dict(values["size"])
        values["resample"] = int(values["resample"])
        for name in ("image_mean", "image_std"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        return {**extra, **values, _TYPE_FIELD: "MllamaImageProcessor"}

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, revision: str | None = None, **overrides: Any
    ) -> Self:
        """Read a processor from a folder, a `.json` file or a hub id (`owner/name`).

        Args:
            path: where `preprocessor_config.json` lies, or such a file.
            revision: branch, tag or commit of a hub id.
            **overrides: arguments of the constructor that replace what the file says.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or its values are unusable.
            TypeError: an override is no argument of the constructor.
        """
        from mllama_jax.hub import local_folder

        file = epath.Path(path).expanduser()
        if file.suffix != ".json" or file.is_dir():
            file = local_folder(path, allow_patterns=[CONFIG_NAME], revision=revision) / CONFIG_NAME
        if not file.exists():
            raise FileNotFoundError(
                f"{file}: no such file; expected the image processor's configuration, which a "
                "checkpoint's folder holds beside its weights"
            )
        try:
            values = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}")
        try:
            return dataclasses.replace(cls.from_dict(values), **overrides)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike) -> epath.Path:
        """Write `preprocessor_config.json`, which transformers reads too; returns its path."""
        target = epath.Path(folder).expanduser()
        target.mkdir(parents=True, exist_ok=True)
        file = target / CONFIG_NAME
        file.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        return file

    def _arguments(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _with(self, **changes: Any) -> Self:
        changes = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self, **changes) if changes else self

    @property
    def _tile_size(self) -> int:
        assert self.size is not None  # __post_init__ filled it in
        return self.size["height"]


def _tensor_kind(return_tensors: str | None) -> str:
    kind = getattr(return_tensors, "value", return_tensors)
    if kind in (None, "np", "jax"):
        return kind or "np"
    hint = "; convert NumPy arrays yourself" if kind in ("pt", "tf") else ""
    raise ValueError(f"return_tensors={kind!r}: expected None, 'np' or 'jax'{hint}")


def _warn_of_fractions(samples: list[list[FittedImage]], rescale_factor: float) -> None:
    if found := [image.where for sample in samples for image in sample if image.unit_range]:
        warnings.warn(
            f"{', '.join(found)}: arrays of fractions in [0, 1] are multiplied by rescale_factor "
            f"({rescale_factor}) once more and become nearly black; pass do_rescale=False",
            stacklevel=4,  # who called the processor
        )


def _frozen(value: Any) -> Any:
    return FrozenDict(value) if isinstance(value, Mapping) else value


def _per_channel(value: Any) -> Any:
    """A number or a tuple of them; what is neither is left for the checks to report."""
    if value is None:
        return (0.5, 0.5, 0.5)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(float(item) if is_number(item) else item for item in value)
    return float(value) if is_number(value) else value
