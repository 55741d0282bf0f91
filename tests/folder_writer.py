"""Writes a Hugging Face folder from arrays, or from what makes them, as a conversion does."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from mllama_jax.convert.lazy import ArrayTensor, Region, whole
from mllama_jax.convert.pipeline import write_at_once
from mllama_jax.convert.targets.hugging_face import HuggingFaceTarget
from mllama_jax.convert.targets.target import Output


@dataclass(frozen=True)
class Made:
    """A lazy tensor whose values a function makes, all at once."""

    dtype: np.dtype
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]

    def read(self, region: Region) -> np.ndarray:
        return self.values()


def pending(name: str, values: np.ndarray | Made) -> Output:
    lazy = values if isinstance(values, Made) else ArrayTensor(values)
    return Output(name, name, lazy, np.dtype(lazy.dtype), (whole(lazy.shape),))


def write_folder(
    folder: str | os.PathLike,
    outputs: Iterable[Output],
    config: Mapping[str, Any],
    **options: Any,
) -> None:
    target = HuggingFaceTarget(folder, tuple(outputs), **options)
    files = {"config.json": json.dumps(config).encode()}
    write_at_once(target, epath.Path(folder), files)
