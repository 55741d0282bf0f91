"""What a checkpoint holds against what a model needs: all disagreements at once."""

from collections import Counter
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import LazyTensor
from mllama_jax.convert.mismatch import describe
from mllama_jax.convert.sources.source import Source
from mllama_jax.convert.table import COMPONENTS, Component, Tensor, row_of, spelled, spellings

PARAMETER_DTYPES = tuple(map(np.dtype, (np.float32, jnp.bfloat16, np.float16)))
"""dtypes that parameters may have, in files and in memory."""


def match(
    source: Source, expected: Sequence[Tensor], component: Component
) -> dict[str, tuple[str, LazyTensor]]:
    """Hub name -> (stored name, tensor) of every expected tensor.

    The source may hold more than the component: tensors that the table gives to other parts of the
    model are left alone.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape, stored twice or not of a
            dtype that parameters have; all of them in one message, with the nearest names.
    """
    found, folder = source.tensors, source.path
    architecture = COMPONENTS[component].architecture
    matched: dict[str, tuple[str, LazyTensor]] = {}
    missing, misshaped, other = [], [], []
    used: set[str] = set()
    layouts: Counter[str] = Counter()
    for tensor in expected:
        names = {name: layout for name, layout in spellings(tensor.hub).items() if name in found}
        used.update(names)
        layouts.update(names.values())
        if not names:
            missing.append(tensor.hub)
            continue
        name, *copies = names
        first = found[name]
        matched[tensor.hub] = name, first
        if copies:
            other.append((name, f"also stored as {', '.join(copies)}"))
        if first.shape != tensor.hub_shape:
            misshaped.append((name, first.shape, tensor.hub_shape))
        if first.dtype not in PARAMETER_DTYPES:
            wanted = ", ".join(str(dtype) for dtype in PARAMETER_DTYPES)
            other.append((name, f"dtype {first.dtype}, expected {wanted} (quantised?)"))
    if not matched:
        raise CheckpointError(
            f"{folder} holds no tensor of {architecture}; found {_some(found)}, "
            f"expected {_some([tensor.hub for tensor in expected])}"
        )
    # Missing names are spelled as the folder's own are.
    layout = layouts.most_common(1)[0][0]
    missing = [spelled(hub, layout) for hub in missing]
    unexpected = [name for name in found if name not in used and _may_be_of(component, name)]
    problems = describe(missing=missing, unexpected=unexpected, misshaped=misshaped, other=other)
    if problems:
        raise CheckpointError(
            f"{folder} does not hold {architecture} with this configuration:\n{problems}"
        )
    return matched


def _may_be_of(component: Component, name: str) -> bool:
    """Whether a stored name is not one that the table gives to another part of the model."""
    row = row_of(name)
    return row is None or row.hub.startswith(COMPONENTS[component].hub)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
