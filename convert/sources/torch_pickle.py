"""The pickles in PyTorch's files, read as notes about tensors.

A pickle is a program that may call any function of any module. Here it finds nothing but
`_GLOBALS`: functions that write down what they are given, and names of dtypes.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mllama_jax.convert.errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "complex64": np.complex64,
        "complex128": np.complex128,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
    }.items()
}
"""PyTorch's names of dtypes."""


class Storage(NamedTuple):
    """Flat values: `size` of a dtype, or bytes if it has none, in the record `data/{key}`."""

    dtype: str | None
    key: Any
    size: Any


class View(NamedTuple):
    """A tensor as the pickle describes it; nothing in it is checked yet."""

    storage: Any
    dtype: Any
    offset: Any
    shape: Any
    strides: Any


# What a pickle may name. A pickle can set attributes of any object it gets hold of, so these
# objects have none that can be set, and their classes are out of its reach.


class _Named(NamedTuple):
    """A dtype, or a storage of a dtype."""

    dtype: str | None


class _RebuildTensor:
    """Arguments: storage, offset, shape, strides, requires_grad, hooks, more."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> View:
        if any(more[2:]):
            raise ValueError("a tensor with unapplied conjugation or negation")
        return View(storage, storage.dtype, offset, shape, strides)


class _RebuildTensorOfDtype:
    """For dtypes that have no storage of their own: also a dtype, behind the hooks."""

    __slots__ = ()

    def __call__(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any
    ) -> View:
        return View(storage, dtype.dtype, offset, shape, strides)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor: Any, requires_grad: Any, hooks: Any) -> Any:
        return tensor


class _Mapping(dict):
    """An OrderedDict; its attributes, such as the versions of modules, are left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _MakeMapping:
    __slots__ = ()

    def __call__(self) -> _Mapping:
        return _Mapping()


_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}
_GLOBALS: Mapping[str, Any] = {
    "collections.OrderedDict": _MakeMapping(),
    "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
    "torch._utils._rebuild_tensor_v3": _RebuildTensorOfDtype(),
    "torch._utils._rebuild_parameter": _RebuildParameter(),
    "torch.UntypedStorage": _Named(None),
    "torch.storage.UntypedStorage": _Named(None),
    **{f"torch.{name}Storage": _Named(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch.{dtype}": _Named(dtype) for dtype in DTYPES},
}


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """The unpickler in Python: the one in C makes its memo as large as a file says it should be."""

    def find_class(self, module: str, name: str) -> Any:
        found = _GLOBALS.get(f"{module}.{name}")
        if found is None:
            raise CheckpointError(
                f"its pickle names {module}.{name}, which a file of nothing but tensors does not: "
                "a pickle that tries to run code, or a checkpoint that holds other objects; "
                "refused, nothing was run"
            )
        return found

    def get_extension(self, code: int) -> Any:
        raise CheckpointError(f"its pickle names extension {code}; refused, nothing was run")

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, size = pid
        if kind != "storage" or not isinstance(storage, _Named):
            raise ValueError("a reference to something other than a storage")
        return Storage(storage.dtype, key, size)


def read_pickle(data: bytes, file_name: str) -> dict[str, View]:
    """Name -> view of the state dict that a `data.pkl` describes; no code of it runs.

    Raises:
        CheckpointError: damaged, or more than a mapping from names to tensors.
    """
    try:
        loaded = _Unpickler(io.BytesIO(data)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file_name}: {error}") from None
    except Exception as error:  # the data may make any of its operations fail in any way
        raise CheckpointError(
            f"{file_name}: damaged pickle: {type(error).__name__}: {error}"
        ) from error
    if type(loaded) not in (dict, _Mapping):
        raise CheckpointError(
            f"{file_name}: holds a {_kind(loaded)}; expected a state dict, a mapping from names to "
            "tensors"
        )
    wrong = [
        f"{name if isinstance(name, str) else _kind(name)} ({_kind(entry)})"
        for name, entry in loaded.items()
        if not (isinstance(name, str) and isinstance(entry, View))
    ]
    if wrong:
        raise CheckpointError(
            f"{file_name}: {len(wrong)} of {len(loaded)} entries are not tensors: "
            f"{', '.join(wrong[:5])}{', …' if len(wrong) > 5 else ''}; expected a state dict "
            "alone: torch.save that part of it"
        )
    return loaded


def _kind(value: Any) -> str:
    return type(value).__name__.strip("_").lower()
