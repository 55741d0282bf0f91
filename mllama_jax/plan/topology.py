"""Slices of TPUs that need not be there: their compiler's devices, and meshes of them."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mllama_jax.plan.gpu import gpu_devices
from mllama_jax.plan.hardware import CHIPS, Chip
from mllama_jax.sharding import parse_mesh

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
SHAPES: Mapping[str, tuple[str, ...]] = {
    "h100": ("1", "2", "4", "8"),
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
    "tpu7x": _CUBES,
}
"""Slices that can be rented, by chip, and numbers of GPUs; the compilers take them all."""

MAX_SLICES = 64

_ENVIRONMENT: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
"""For the TPU library to look for neither a metadata server nor TPUs, nor lock others out."""

_COMPILER_OPTIONS: Mapping[str, Mapping[str, Any]] = {"v4": {"chip_config_name": "megacore"}}


@dataclass(frozen=True)
class Topology:
    """Devices and how they are connected.

    Attributes:
        name: of which it was parsed, in its shortest spelling.
        chip: what the devices are.
        shape: chips along each dimension of a slice.
        slices: how many there are; between them is the data-center network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    def closed(self, dim: int) -> bool:
        """Whether a dimension of a slice is a ring of chips, not a line."""
        return self.shape[dim] % self.chip.closes_at == 0

    def devices(self) -> list[jax.Device]:
        """What the compiler compiles for; they can't run anything.

        Raises:
            ImportError: the chip's compiler is not installed.
        """
        if self.chip.is_gpu:
            return gpu_devices(self.num_devices)
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(
                "planning for TPUs needs their compiler: pip install 'mllama-jax[plan]'"
            )
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        options = dict(_COMPILER_OPTIONS.get(self.chip.name, {}))
        if self.slices > 1:
            options["num_slices"] = self.slices
        shape = "x".join(map(str, self.shape))
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{self.chip.name}:{shape}", **options
        )
        return list(description.devices)

    def mesh(self, text: str) -> Mesh:
        """The devices as a mesh, such as ``"fsdp=8,tensor=2"``.

        Raises:
            ValueError: as `mllama_jax.sharding.parse_mesh`.
        """
        return parse_mesh(text, self.devices())


def parse_topology(name: str) -> Topology:
    """A topology from its name: chip, shape and slices, as in ``"v5e:4x4"`` or ``"v5e:4x4*2"``.

    ``×`` does for ``*``, and any order of the dimensions.

    Raises:
        ValueError: there is no such chip, or no such slice of it; names those that there are.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:[*×](\d+))?", name.strip().lower())
    if match is None:
        raise ValueError(
            f"topology {name!r} is not of the form chip:shape, such as v5e:4x4, or v5e:4x4*2 for "
            f"two slices; expected one of\n{known_topologies()}"
        )
    kind, written, slices = match[1], match[2], int(match[3] or 1)
    if kind not in SHAPES:
        raise ValueError(f"topology {name!r}: unknown chip; expected one of\n{known_topologies()}")
    dims = tuple(int(size) for size in written.split("x"))
    shapes = {tuple(sorted(_dims(shape))): shape for shape in SHAPES[kind]}
    shape = shapes.get(tuple(sorted(dims)))
    if shape is None:
        raise ValueError(
            f"topology {name!r}: {kind} has no slice {written}; expected one of "
            f"{', '.join(f'{kind}:{shape}' for shape in SHAPES[kind])}, or several of them, as in "
            f"{kind}:{SHAPES[kind][-1]}*2"
        )
    if CHIPS[kind].is_gpu and slices > 1:
        raise ValueError(f"topology {name!r}: expected the GPUs of one host, such as h100:8")
    if not 1 <= slices <= MAX_SLICES:
        raise ValueError(f"topology {name!r}: expected 1 to {MAX_SLICES} slices")
    short = f"{kind}:{shape}" + (f"*{slices}" if slices > 1 else "")
    return Topology(short, CHIPS[kind], _dims(shape), slices)


def known_topologies() -> str:
    """For people: the slices of every chip, a chip a line."""
    return "\n".join(f"  {kind}: {', '.join(shapes)}" for kind, shapes in SHAPES.items())


def prepare_environment() -> None:
    """Keeps a program that only plans off the accelerators of the machine it runs on.

    To be called before JAX has looked for devices; later it changes nothing. Flags for XLA in the
    environment are dropped: the TPU compiler ends a process at one that is another compiler's.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.pop("XLA_FLAGS", None)


def _dims(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split("x"))
