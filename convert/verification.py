"""Two checkpoints of any format, compared tensor by tensor."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mllama_jax.configs import MllamaConfig
from mllama_jax.convert.differences import Difference, Tolerance, difference_of
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import LazyTensor, num_bytes
from mllama_jax.convert.parts import hub_names
from mllama_jax.convert.sources import Source, open_source
from mllama_jax.convert.table import COMPONENTS, Component, Config, part_config
from mllama_jax.convert.values import Values, blocks_of, in_threads, values_of


@dataclass(frozen=True)
class Compared:
    """One tensor of both checkpoints.

    Attributes:
        name: in the Hub layout; a tensor that has none keeps its stored name.
        shape, dtype_a, dtype_b: of the tensors.
        values_a, values_b: what kind of numbers they hold.
        difference: how their numbers differ.
        equal: whether that is nothing, or within the tolerance.
    """

    name: str
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    values_a: Values
    values_b: Values
    difference: Difference
    equal: bool


@dataclass(frozen=True)
class Verification:
    """What `verify` finds.

    Attributes:
        a, b: the folders.
        format_a, format_b: of their files.
        component: the part of the model that was compared: the smaller of what the two hold.
        tolerance: None if the tensors had to have the same bits.
        tensors: those that both have in the same shape.
        only_in_a, only_in_b: names of tensors that the other lacks, of the component.
        misshaped: (name, shape in A, shape in B).
        config_differences: fields of the configurations that differ, for information: they make
            different models of the same tensors, but are no part of the verdict.
        notes: what a user should know about the comparison.
    """

    a: str
    b: str
    format_a: str
    format_b: str
    component: Component
    tolerance: Tolerance | None
    tensors: tuple[Compared, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    config_differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the verdict is that they are the same."""
        return not (self.only_in_a or self.only_in_b or self.misshaped or self.differing)

    @property
    def differing(self) -> tuple[Compared, ...]:
        """The tensors that are not equal, the largest absolute difference first."""
        found = [tensor for tensor in self.tensors if not tensor.equal]
        return tuple(sorted(found, key=lambda tensor: -tensor.difference.max_abs))

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries, lists, texts and numbers.

        Tensors that are identical and finite are only counted.
        """
        values = dataclasses.asdict(self)
        values["tensors"] = [
            dataclasses.asdict(tensor)
            for tensor in self.tensors
            if not (tensor.difference.identical and tensor.values_a.finite)
        ]
        counts = {"compared": len(self.tensors), "differing": len(self.differing)}
        # JSON has no infinity.
        return json.loads(json.dumps({"equal": self.equal, **counts, **values}), parse_constant=str)


@dataclass(frozen=True)
class Pairing:
    """Two checkpoints of which names, shapes and dtypes were compared, but no value yet.

    Attributes:
        a, b: the checkpoints.
        component: the part of the model that both hold.
        pairs: name -> the tensors of both, of the same shape.
        only_in_a, only_in_b, misshaped: as in `Verification`.
    """

    a: Source
    b: Source
    component: Component
    pairs: Mapping[str, tuple[LazyTensor, LazyTensor]]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def num_bytes(self) -> int:
        """How much a comparison of the values reads."""
        return sum(num_bytes(a) + num_bytes(b) for a, b in self.pairs.values())


def verify(
    a: Source | str | os.PathLike,
    b: Source | str | os.PathLike,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compares two checkpoints of any formats, a few blocks in memory at a time.

    Without a tolerance tensors are equal if they have the same dtype and the same bits: 0.0 and
    -0.0 differ, and so do NaNs of different payload. With `atol` or `rtol` (the other is then 0)
    the dtypes may differ and all numbers have to be close: `|a - b| <= atol + rtol * |b|`, computed
    in float64, which holds every value of the two exactly; infinities are close to themselves and
    NaN to NaN. `atol=0` therefore asks for the same numbers in any dtypes.

    If one holds a whole model and the other a part of it, that part is compared.

    Args:
        a, b: what `open_source` returns, or what it takes.
        atol, rtol: absolute tolerance, and relative to B.
        workers: threads; None is one for each processor, at most 8.
        progress: told of bytes as they are read from both; `Pairing.num_bytes` is their sum.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: one can't be read, they have no part in
            common, or a tolerance is not a number from 0 on.
    """
    return compare(pair(a, b), atol=atol, rtol=rtol, workers=workers, progress=progress)


def pair(a: Source | str | os.PathLike, b: Source | str | os.PathLike) -> Pairing:
    """Finds the tensors that two checkpoints have in common; see `verify`."""
    a, b = (source if isinstance(source, Source) else open_source(source) for source in (a, b))
    component = _common_component(a, b)
    tensors_a, tensors_b = _by_hub_name(a, component), _by_hub_name(b, component)
    common = [name for name in tensors_a if name in tensors_b]
    shapes = {name: (tensors_a[name].shape, tensors_b[name].shape) for name in common}
    return Pairing(
        a=a,
        b=b,
        component=component,
        pairs={
            name: (tensors_a[name], tensors_b[name])
            for name in common
            if shapes[name][0] == shapes[name][1]
        },
        only_in_a=tuple(name for name in tensors_a if name not in tensors_b),
        only_in_b=tuple(name for name in tensors_b if name not in tensors_a),
        misshaped=tuple((name, *pair) for name, pair in shapes.items() if pair[0] != pair[1]),
    )


def compare(
    pairing: Pairing,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compares the values of a pairing; see `verify`."""
    tolerance = None
    if atol is not None or rtol is not None:
        tolerance = Tolerance(atol or 0.0, rtol or 0.0)
    a, b = pairing.a, pairing.b
    return Verification(
        a=os.fspath(a.path),
        b=os.fspath(b.path),
        format_a=a.format,
        format_b=b.format,
        component=pairing.component,
        tolerance=tolerance,
        tensors=_compare_values(pairing, tolerance, workers, progress or (lambda _: None)),
        only_in_a=pairing.only_in_a,
        only_in_b=pairing.only_in_b,
        misshaped=pairing.misshaped,
        config_differences=_config_differences(
            part_config(a.config, pairing.component), part_config(b.config, pairing.component)
        ),
        notes=_notes(pairing),
    )


def _common_component(a: Source, b: Source) -> Component:
    """The part of the model that both hold."""
    hub_a, hub_b = COMPONENTS[a.component].hub, COMPONENTS[b.component].hub
    if hub_a.startswith(hub_b):
        return a.component
    if hub_b.startswith(hub_a):
        return b.component
    raise ValueError(
        f"nothing to compare: {a.path} holds {COMPONENTS[a.component].architecture}, {b.path} "
        f"holds {COMPONENTS[b.component].architecture}"
    )


def _by_hub_name(source: Source, component: Component) -> dict[str, LazyTensor]:
    """The tensors of a component, and those that are of no part of the model."""
    hubs = hub_names(source)
    found: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        hub = hubs.get(name, name)
        if name in hubs and not hub.startswith(COMPONENTS[component].hub):
            continue
        if hub in found:
            raise CheckpointError(f"{source.path}: {hub} is stored twice, under different names")
        found[hub] = tensor
    return found


def _compare_values(
    pairing: Pairing,
    tolerance: Tolerance | None,
    workers: int | None,
    progress: Callable[[int], None],
) -> tuple[Compared, ...]:
    def look(job: tuple[str, Any]) -> tuple[str, Values, Values, Difference]:
        name, region = job
        block_a, block_b = (tensor.read(region) for tensor in pairing.pairs[name])
        found = difference_of(block_a, block_b, region, tolerance)
        values_a = values_of(block_a)
        values_b = values_a if found.identical else values_of(block_b)
        progress(block_a.nbytes + block_b.nbytes)
        return name, values_a, values_b, found

    jobs = [(name, region) for name, (a, _) in pairing.pairs.items() for region in blocks_of(a)]
    found = dict.fromkeys(pairing.pairs, (Values(), Values(), Difference()))
    for name, values_a, values_b, difference in in_threads(look, jobs, workers):
        before_a, before_b, before = found[name]
        found[name] = before_a + values_a, before_b + values_b, before + difference
    return tuple(
        Compared(
            name=name,
            shape=a.shape,
            dtype_a=str(a.dtype),
            dtype_b=str(b.dtype),
            values_a=found[name][0],
            values_b=found[name][1],
            difference=found[name][2],
            equal=not found[name][2].count and (tolerance is not None or a.dtype == b.dtype),
        )
        for name, (a, b) in pairing.pairs.items()
    )


def _config_differences(a: Config, b: Config, section: str = "") -> tuple[str, ...]:
    """Fields that this package uses and that differ, as `name: value in A, value in B`."""
    found: list[str] = []
    for field in dataclasses.fields(a):
        value_a, value_b = getattr(a, field.name), getattr(b, field.name)
        if field.name == "extra" or value_a == value_b:
            continue
        name = f"{section}{field.name}"
        if isinstance(a, MllamaConfig) and field.name.endswith("_config"):
            found += _config_differences(value_a, value_b, f"{name}.")
        else:
            found.append(f"{name}: {value_a!r} in A, {value_b!r} in B")
    return tuple(found)


def _notes(pairing: Pairing) -> tuple[str, ...]:
    notes = []
    for name, source in (("A", pairing.a), ("B", pairing.b)):
        notes += [f"{name}: {note}" for note in source.notes]
        if source.component != pairing.component:
            notes.append(
                f"{name} holds more, {COMPONENTS[source.component].architecture}; only "
                f"{COMPONENTS[pairing.component].architecture} was compared"
            )
    return tuple(notes)
