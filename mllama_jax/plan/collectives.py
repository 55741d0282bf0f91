"""Exchanges between devices in a compiled program: what is moved, between whom, and how fast."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from mllama_jax.plan.hlo_text import Instruction, Module, arrays, num_bytes, reached
from mllama_jax.plan.parts import OTHER, Phase
from mllama_jax.plan.topology import Topology

Operation = Literal[
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
]


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind, seen from one device.

    Attributes:
        operation: such as "all-gather".
        bytes: of one whole array: what a device has after an all-gather, before a reduce-scatter,
            and before and after the others.
        group: the devices that exchange it, as places in the mesh; of a permutation, all pairs of
            sender and receiver one after another.
        slices: how many exchange it over the data-center network; 1 for none.
        overlaps: it goes on while the device computes; otherwise that waits for it.
        runs: how often, over all runs of the loops around it.
    """

    operation: Operation
    bytes: int
    group: tuple[int, ...]
    slices: int = 1
    overlaps: bool = False
    part: str = OTHER
    phase: Phase = "forward"
    runs: float = 1.0
    in_open_loop: bool = False

    @property
    def group_size(self) -> int:
        if self.slices > 1:
            return self.slices
        return 2 if self.operation == "collective-permute" else len(self.group)

    @property
    def bytes_sent(self) -> float:
        """By each device in one run, as the best algorithms do it."""
        if self.operation == "collective-permute":
            return float(self.bytes)
        n = self.group_size
        rounds = 2 if self.operation == "all-reduce" else 1
        return rounds * self.bytes * (n - 1) / n

    def axes(self, mesh: Mesh) -> tuple[str, ...]:
        """The mesh axes along which it exchanges."""
        if self.slices > 1:
            return ("data",)
        places = np.array(np.unravel_index(list(self.group), mesh.devices.shape))
        if self.operation == "collective-permute":
            moves = (places[:, 0::2] != places[:, 1::2]).any(axis=1)
        else:
            moves = (places != places[:, :1]).any(axis=1)
        return tuple(str(axis) for axis, moved in zip(mesh.axis_names, moves, strict=True) if moved)


_OPERATIONS: tuple[Operation, ...] = (
    *("all-gather", "all-reduce", "reduce-scatter"),
    *("all-to-all", "collective-permute"),
)


def find_collective(module: Module, instruction: Instruction) -> Collective | None:
    """The exchange that an instruction is or starts, also inside a fusion."""
    opcode = instruction.opcode
    if opcode == "send":
        return _between_slices(instruction)
    if opcode == "fusion":
        return _fused(module, instruction)
    operation = _operation(opcode.removesuffix("-start"))
    if operation is None:
        return None
    return _collective(operation, instruction, overlaps=opcode.endswith("-start"))


def _fused(module: Module, fusion: Instruction) -> Collective | None:
    """An exchange in a fusion: a sum of which only a part is kept, or one that the fusion starts.

    One that goes on while others compute is written in each of them, as a link of a chain: only
    its start counts.
    """
    inner = list(reached(module, fusion.called))
    starts = any(i.attribute("custom_call_target") == "AsyncCollectiveStart" for i in inner)
    for instruction in inner:
        operation = _operation(instruction.opcode)
        if operation is None or ("chain_id=" in instruction.rest and not starts):
            continue
        if operation == "all-reduce" and fusion.called.startswith("all-reduce-scatter"):
            size = sum(num_bytes(*array) for array in arrays(instruction.type))
            return Collective("reduce-scatter", size, _group(instruction), overlaps=starts)
        return _collective(operation, instruction, overlaps=starts)
    return None


def _operation(name: str) -> Operation | None:
    return next((operation for operation in _OPERATIONS if operation == name), None)


def _collective(operation: Operation, instruction: Instruction, overlaps: bool) -> Collective:
    # A start's result holds what goes in, what comes out, and counters.
    found = [num_bytes(*array) for array in arrays(instruction.type) if array[0] != "u32"]
    found = found or [num_bytes(*array) for array in arrays(instruction.type)]
    group = _group(instruction)
    size = sum(found)
    if instruction.opcode.endswith("-start"):
        if operation in ("all-gather", "reduce-scatter"):  # the whole and a part of it
            size = size * len(group) // (len(group) + 1)
        elif operation != "all-reduce":
            size //= 2
    elif operation == "reduce-scatter":
        size *= len(group)
    return Collective(operation, size, group, overlaps=overlaps)


def _between_slices(send: Instruction) -> Collective | None:
    """What a device sends over the data-center network; not all patterns say between how many."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest)
    if kind is None:
        return None
    operation = _operation(kind[1].lower().replace("_", "-")) or "collective-permute"
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', send.rest)
    slices = len(_numbers(target[1])) if target else 2
    size = num_bytes(*arrays(send.type)[0])
    if operation == "all-gather":
        size *= slices
    return Collective(operation, size, (), slices, overlaps=True)


_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_STRIDED = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_OF_MESH = re.compile(
    r"replica_groups=@?(?:\w+)?mesh\[([^\]]*)\](?:,? ?device_ids=\(([^)]*(?:\([\d,]+\))?)\))? ?"
    r"\{([^}]*)\}"
)


def _group(instruction: Instruction) -> tuple[int, ...]:
    """The first of the groups; they are alike."""
    text = instruction.rest
    if match := _PAIRS.search(text):
        return tuple(_numbers(match[1]))
    if match := _LISTED.search(text):
        return tuple(_numbers(match[1]))
    if match := _STRIDED.search(text):
        return tuple(int(place) for place in _strided(match[1])[0])
    if match := _OF_MESH.search(text):
        return _along_axes(match[1], match[2], match[3])
    raise ValueError(f"{instruction.opcode} {instruction.name} has groups of an unknown form")


def _strided(text: str) -> np.ndarray:
    """Places such as ``[2,8]<=[8,2]T(1,0)``: a count in one shape, turned, in another."""
    result, _, source = text.partition("<=")
    dims, _, order = source.partition("T")
    places = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    if order:
        places = places.transpose(_numbers(order))
    return places.reshape(_numbers(result))


def _along_axes(mesh: str, devices: str | None, axes: str) -> tuple[int, ...]:
    """The first group of a mesh such as ``'a'=2,'b'=4`` along axes such as ``'a','b':(2)2``."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    places = np.arange(math.prod(sizes.values()))
    if devices:
        places = _strided(devices).ravel() if "<=" in devices else np.array(_numbers(devices))
    shape: list[int] = []
    used: list[bool] = []
    chosen = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in sizes.items():
        before, part = chosen.get(name, (1, 1))
        shape += [before, part, size // before // part]
        used += [False, name in chosen, False]
    grid = places.reshape(shape)
    index = tuple(slice(None) if use else 0 for use in used)
    return tuple(int(place) for place in grid[index].ravel())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def network_seconds(collective: Collective, topology: Topology, mesh: Mesh) -> float:
    """What one run takes at least, from bytes and the links that its devices have.

    Nothing else is on the links, and no latency is counted.
    """
    chip = topology.chip
    if collective.slices > 1:
        return collective.bytes_sent / chip.dcn_bandwidth
    if chip.is_gpu:
        return collective.bytes_sent / chip.link_bandwidth
    chips = _coordinates(mesh, collective.group)
    if collective.operation == "collective-permute":
        return collective.bytes * _hops_a_link(topology, chips) / chip.link_bandwidth
    chips = sorted(set(chips))
    if len(chips) == 1:
        return 0.0
    if collective.operation == "all-to-all":
        return collective.bytes * _crowding(topology, chips) / chip.link_bandwidth
    links = min(_links(topology, place, chips) for place in chips)
    rounds = 2 if collective.operation == "all-reduce" else 1
    moved = rounds * collective.bytes * (len(chips) - 1) / len(chips)
    return moved / links / chip.link_bandwidth


Place = tuple[int, ...]


def _coordinates(mesh: Mesh, places: Sequence[int]) -> list[Place]:
    devices = mesh.devices.ravel()
    return [tuple(devices[place].coords) for place in places]


def _spans(topology: Topology, chips: Sequence[Place]) -> list[tuple[int, int, bool]]:
    """Each dimension that chips differ in, how many places they take there, whether in a ring."""
    spans = []
    for dim, size in enumerate(topology.shape):
        places = len({chip[dim] for chip in chips})
        if places > 1:
            spans.append((dim, places, places == size and topology.closed(dim)))
    return spans


def _links(
    topology: Topology, place: Place, chips: Sequence[Place], dims: Sequence[int] = (0, 1, 2)
) -> int:
    """A chip's links to others of its group: two in a ring or inside a line, one at its end."""
    links = 0
    for dim, _, ring in _spans(topology, chips):
        along = [chip[dim] for chip in chips]
        at_end = place[dim] in (min(along), max(along))
        links += (2 if ring or not at_end else 1) if dim in dims else 0
    return links


def _hops_a_link(topology: Topology, chips: Sequence[Place]) -> float:
    """Links that each array crosses, for every link in the dimensions in which arrays move."""
    pairs = list(zip(chips[0::2], chips[1::2], strict=True))
    hops = sum(_hops(topology, sender, receiver) for sender, receiver in pairs)
    dims = [dim for dim in range(3) if any(a[dim] != b[dim] for a, b in pairs)]
    links = sum(_links(topology, sender, chips, dims) for sender, _ in pairs)
    return hops / max(links, 1)


def _hops(topology: Topology, sender: Place, receiver: Place) -> int:
    hops = 0
    for dim, size in enumerate(topology.shape):
        distance = abs(sender[dim] - receiver[dim])
        hops += min(distance, size - distance) if topology.closed(dim) else distance
    return hops


def _crowding(topology: Topology, chips: Sequence[Place]) -> float:
    """How often a chip's array crosses each link in the middle of the longest dimension."""
    return max(places / (8 if ring else 4) for _, places, ring in _spans(topology, chips))
