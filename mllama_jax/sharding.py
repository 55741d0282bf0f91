"""What is split over which devices: one table from logical axes to the axes of a mesh.

Modules name the axes of their parameters (`mllama_jax.layers.logical`); only this file says what a
name means on a mesh. A mesh has some of `MESH_AXES`, in any order; what the table would split over
an axis that the mesh lacks is not split.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mllama_jax.shapes import Array

if TYPE_CHECKING:
    from mllama_jax.pretrained import PretrainedModule

MESH_AXES: Mapping[str, str] = {
    "data": "samples; every group of devices along it holds all parameters",
    "fsdp": "samples, and parameters on their hidden size; gathered layer by layer when used",
    "tensor": "heads, feed-forward width and vocabulary; the computation itself is split",
}
"""The axes that a mesh may have, outermost first, and what is split over them."""

SPLIT_OVER: dict[str, tuple[str, ...]] = {
    "layers": (),  # scanned over: a device that holds only some would have to be asked each step
    "batch": ("data", "fsdp"),
    "sampled": ("data", "fsdp", "tensor"),  # rows of which each device draws its own
    "gathered_batch": ("data",),  # samples that meet a table of which each device has its own part
    "length": (),
    "vocab": ("fsdp", "tensor"),
    "head_input": (),
    "embedding_rows": ("tensor",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "embed_groups": ("fsdp",),  # of inputs that share a scale (mllama_jax.quantisation)
    "mlp_groups": ("tensor",),
    "head_dim_groups": (),
    "norm": (),
    "vision_output": ("tensor",),
    "vision_embed": ("fsdp",),
    "vision_mlp": ("tensor",),
    "vision_heads": ("tensor",),
    "vision_head_dim": (),
    "patch_height": (),
    "patch_width": (),
    "channels": (),
}
"""Logical axis of a parameter or an activation -> the mesh axes that it is split over."""

REPLICATED_IF_FEWER = ("kv_heads", "vision_heads")
"""Axes that are kept whole on a mesh axis that is a multiple of them: fewer heads than devices."""

SPLIT_AS_FAR_AS_DIVISIBLE = (
    *("batch", "sampled", "gathered_batch", "vocab", "embedding_rows"),
    *("embed_groups", "mlp_groups"),
)
"""Axes that are split over the first of their mesh axes only, or not at all, where more would not
divide them: a small batch; the 128264 rows of the released models' embedding over 16 devices; the
few groups of a dimension."""


def param_axes(model: "PretrainedModule") -> dict[str, Any]:
    """Logical axis names of every parameter (a tuple for each), in the tree of the parameters.

    Raises:
        ValueError: a parameter's axes have no names.
    """
    return flax.traverse_util.unflatten_dict(
        {path: axes for path, (axes, _) in annotated(model).items()}
    )


def param_shardings(model: "PretrainedModule", mesh: Mesh) -> dict[str, Any]:
    """A `NamedSharding` for every parameter, in the tree of the parameters.

    Raises:
        ValueError: as `check_mesh`; or parameters that the mesh can't split, see `partition_spec`:
            all of them in one message.
    """
    check_mesh(mesh)
    shardings: dict[tuple[str, ...], NamedSharding] = {}
    problems: dict[str, list[str]] = {}
    for path, (axes, leaf) in annotated(model).items():
        try:
            shardings[path] = NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
        except ValueError as error:
            problems.setdefault(str(error), []).append("/".join(path))
    if problems:
        lines = [f"  {problem}: {_some(names)}" for problem, names in problems.items()]
        raise ValueError(
            f"the parameters can't be split over the mesh {_written(mesh)}:\n" + "\n".join(lines)
        )
    return flax.traverse_util.unflatten_dict(shardings)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array is split over a mesh.

    Args:
        axes: the logical name of each axis; None is never split.
        shape: of the whole array.

    Raises:
        ValueError: a name that the table lacks; two axes on one mesh axis; a size that the mesh
            does not divide, unless the axis is one of `REPLICATED_IF_FEWER` or
            `SPLIT_AS_FAR_AS_DIVISIBLE`.
    """
    spec: list[Any] = []
    used: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in SPLIT_OVER:
            raise ValueError(f"axis {axis} is not one of {', '.join(SPLIT_OVER)}")
        over = SPLIT_OVER[axis] if axis else ()
        for mesh_axis in over:
            if mesh_axis in used:
                raise ValueError(f"axes {used[mesh_axis]} and {axis} are both on {mesh_axis}")
            used[mesh_axis] = str(axis)
        over = tuple(mesh_axis for mesh_axis in over if mesh_axis in mesh.shape)
        parts = _parts(over, mesh)
        while over and size % parts and axis in SPLIT_AS_FAR_AS_DIVISIBLE:
            over = over[:-1]
            parts = _parts(over, mesh)
        if size % parts:
            if axis not in REPLICATED_IF_FEWER or parts % size:
                sizes = " × ".join(f"{name}={mesh.shape[name]}" for name in over)
                raise ValueError(f"axis {axis} of size {size} is not divisible by {sizes}")
            over = ()
        spec.append(over[0] if len(over) == 1 else over or None)
    return PartitionSpec(*spec)


def constrain(x: Array, mesh: Mesh | None, *axes: str | None) -> Array:
    """Splits an array inside a compiled function over the mesh, as `partition_spec` says.

    The same holds for its gradient: devices that hold a part of the array get the sum for that
    part alone (a reduce-scatter). Without a mesh nothing happens.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _sharding(x.shape, mesh, axes))


def num_parts(axis: str, size: int, mesh: Mesh | None) -> int:
    """Into how many parts an axis of an array is split; of size 0, into how many at most."""
    if mesh is None:
        return 1
    over = partition_spec((axis,), (size,), mesh)[0]
    return _parts((over,) if isinstance(over, str) else over or (), mesh)


def place(x: Array | np.ndarray, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """Puts an array on a mesh, split as `partition_spec` says; whole on every device without axes.

    In a job of several processes all of them call this with the same array, and each puts what
    its own devices hold. Without a mesh the array goes to the default device.
    """
    if mesh is None:
        return jnp.asarray(x)
    axes = axes or (None,) * x.ndim
    if isinstance(x, jax.Array) and (_is_local(mesh) or not x.is_fully_addressable):
        return jax.device_put(x, _sharding(x.shape, mesh, axes))
    return place_parts(np.asarray(x).__getitem__, x.shape, mesh, *axes)


def place_parts(
    part: Callable[[Any], np.ndarray],
    shape: tuple[int, ...],
    mesh: Mesh | None,
    *axes: str | None,
) -> jax.Array:
    """As `place`, for an array of which ``part(slices)`` returns a region."""
    if mesh is None:
        return jnp.asarray(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, _sharding(shape, mesh, axes), part)


def zeros(
    shape: tuple[int, ...], dtype: DTypeLike, mesh: Mesh | None, *axes: str | None
) -> jax.Array:
    """As `place`, for zeros."""
    return jnp.zeros(shape, dtype, device=None if mesh is None else _sharding(shape, mesh, axes))


def _sharding(shape: Sequence[int], mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def _is_local(mesh: Mesh) -> bool:
    return all(device.process_index == jax.process_index() for device in mesh.devices.flat)


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError unless the mesh has some of `MESH_AXES` and no others, of type Auto."""
    unknown = [str(axis) for axis in mesh.axis_names if axis not in MESH_AXES]
    if unknown:
        raise ValueError(
            f"mesh {_written(mesh)}: unknown axes {', '.join(unknown)}; "
            f"expected some of {', '.join(MESH_AXES)}"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh {_written(mesh)} has axis types {mesh.axis_types}; the model needs Auto: use "
            "mllama_jax.sharding.parse_mesh, or jax.make_mesh with "
            f"axis_types=(AxisType.Auto,) * {len(mesh.axis_names)}"
        )


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh from its written form, such as ``"fsdp=8,tensor=2"``.

    Args:
        text: sizes of some of `MESH_AXES`. One of them may be -1, for all devices that the others
            leave. The order does not matter: the mesh has that of `MESH_AXES`.
        devices: what it is made of; all devices of all processes if None.

    Raises:
        ValueError: not of this form, or not made of exactly these devices.
    """
    devices = jax.devices() if devices is None else devices
    written: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if axis not in MESH_AXES or axis in written or not size.removeprefix("-").isdecimal():
            raise ValueError(
                f"mesh {text!r}: {item!r} is not of the form axis=size with each of "
                f"{', '.join(MESH_AXES)} at most once"
            )
        written[axis] = int(size)
    given = math.prod(size for size in written.values() if size != -1)
    if list(written.values()).count(-1) == 1 and given > 0:
        written = {k: len(devices) // given if v == -1 else v for k, v in written.items()}
    sizes = {axis: written[axis] for axis in MESH_AXES if axis in written}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {text!r}: expected positive sizes whose product is {len(devices)}, the number "
            "of devices; one of them may be -1, for the rest"
        )
    grid = _arranged(text, sizes, devices)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _arranged(text: str, sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the mesh's shape: neighbours along an axis are neighbours on the network.

    Between slices of TPUs the network is slow: only the axis ``data``, which exchanges nothing but
    gradients, goes over it.
    """
    num_slices = _num_slices(devices)
    shape = tuple(sizes.values())
    if num_slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes.get("data", 1) % num_slices:
        raise ValueError(
            f"mesh {text!r}: the {len(devices)} devices are {num_slices} slices, and only the axis "
            "data may go over the slow network between them: expected data to be a multiple of "
            f"{num_slices}"
        )
    within = tuple(size // num_slices if axis == "data" else size for axis, size in sizes.items())
    between = tuple(num_slices if axis == "data" else 1 for axis in sizes)
    return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
    )


def device_kind(mesh: Mesh | None) -> str:
    """What JAX calls the mesh's devices; without one, the first device that there is."""
    kind: str = (jax.devices() if mesh is None else mesh.devices.ravel())[0].device_kind
    return kind


def describe(mesh: Mesh) -> str:
    """A line for people: the axes, the devices, and what is split into how many parts."""
    devices = mesh.devices.ravel().tolist()
    kind = device_kind(mesh)
    kind = _TRADE_NAMES.get(kind, kind)
    num_slices = _num_slices(devices)
    slices = f" ({num_slices} slices of {mesh.size // num_slices})" if num_slices > 1 else ""
    parts = {"parameters": ("fsdp", "tensor"), "batch": SPLIT_OVER["batch"]}
    said = []
    for name, over in parts.items():
        ways = _parts([axis for axis in over if axis in mesh.shape], mesh)
        said.append(f"{name} split {ways} ways" if ways > 1 else f"{name} whole")
    plural = "s" if mesh.size > 1 else ""
    return (
        f"mesh {_written(mesh)} over {mesh.size} {kind} device{plural}{slices}: {', '.join(said)}"
    )


_TRADE_NAMES = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e"}


def _num_slices(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices, each with a fast network of its own, the devices belong to."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", None) for device in devices})


def _parts(mesh_axes: Sequence[str], mesh: Mesh) -> int:
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)


def annotated(
    model: "PretrainedModule",
) -> Mapping[tuple[str, ...], tuple[tuple[str | None, ...], jax.ShapeDtypeStruct]]:
    """Path -> logical axis names, shape and dtype of every parameter.

    Raises:
        ValueError: a parameter's axes have no names.
    """
    # A mesh that can't split the parameters can't split activations either, and says less about it.
    return _annotations(model.clone(mesh=None, attention="xla"))


@lru_cache(maxsize=8)  # a job asks several times, and tracing a model takes seconds
def _annotations(model: "PretrainedModule") -> Any:
    def init(key: jax.Array) -> Any:
        inputs: Any = model.dummy_inputs()
        return model.init(key, **inputs)["params"]

    boxed = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0)))
    nameless = [
        "/".join(path) for path, leaf in boxed.items() if not isinstance(leaf, nn.Partitioned)
    ]
    if nameless:
        raise ValueError(f"parameters without logical axis names: {_some(nameless)}")
    return MappingProxyType({path: (tuple(x.names), x.value) for path, x in boxed.items()})


def _written(mesh: Mesh) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
