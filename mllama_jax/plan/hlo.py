"""What a compiled program does, read from the text of its schedule.

The compiler writes an estimate of cycles at nearly every instruction that computes. A loop's body
counts as often as the loop runs. What has no estimate is listed instead: calls of kernels, and
collectives with their bytes.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

from mllama_jax.loops import most_runs
from mllama_jax.plan.collectives import Collective, find_collective
from mllama_jax.plan.hlo_text import Instruction, Module, arrays, reached, trip_count
from mllama_jax.plan.parts import COPIES, OTHER, Phase, part_of, phase_of

Kind = Literal["products", "copies", "vector"]


@dataclass(frozen=True)
class Cycles:
    """The compiler's estimate for some operations of one device.

    Attributes:
        part: of the model, one of `mllama_jax.plan.parts.PARTS`.
        kind: matrix products with what is fused to them; copies; everything else.
        phase: forward, recomputed or backward.
        cycles: over all runs of the loops around them.
        in_open_loop: they run in a loop whose length the values decide, such as decoding; the
            cycles are of one run of it.
    """

    part: str
    kind: Kind
    phase: Phase
    cycles: float
    in_open_loop: bool


@dataclass(frozen=True)
class Unestimated:
    """Operations that compute, and whose cycles the compiler failed to estimate."""

    part: str
    runs: float
    in_open_loop: bool


@dataclass(frozen=True)
class KernelCall:
    """Calls of one Pallas kernel, of which the compiler estimates nothing.

    Attributes:
        name: of the kernel.
        operands: dtype and shape of each, on one device.
        results: likewise.
        calls: how often, over all runs of the loops around it.
    """

    name: str
    part: str
    phase: Phase
    operands: tuple[tuple[str, tuple[int, ...]], ...]
    results: tuple[tuple[str, tuple[int, ...]], ...]
    calls: float
    in_open_loop: bool


@dataclass(frozen=True)
class ProgramCost:
    """What one device does in one run of a program."""

    cycles: tuple[Cycles, ...]
    collectives: tuple[Collective, ...]
    kernels: tuple[KernelCall, ...]
    unestimated: tuple[Unestimated, ...] = ()

    @property
    def total_cycles(self) -> float:
        return sum(item.cycles for item in self.cycles)

    def by_part(self) -> dict[str, float]:
        """Cycles, most first."""
        parts: dict[str, float] = defaultdict(float)
        for item in self.cycles:
            parts[item.part] += item.cycles
        return dict(sorted(parts.items(), key=lambda entry: -entry[1]))

    @property
    def has_open_loops(self) -> bool:
        """Whether something runs in a loop whose length the schedule does not say."""
        items: tuple[_Item, ...] = (*self.cycles, *self.collectives, *self.kernels)
        return any(item.in_open_loop for item in items)

    def in_open_loop(self) -> Self:
        """Only what one run of the loops costs whose length the values decide: a decoding step."""
        return replace(
            self,
            cycles=tuple(item for item in self.cycles if item.in_open_loop),
            collectives=tuple(item for item in self.collectives if item.in_open_loop),
            kernels=tuple(item for item in self.kernels if item.in_open_loop),
            unestimated=tuple(item for item in self.unestimated if item.in_open_loop),
        )


class OutOfMemory(NamedTuple):
    """What a program takes of each device, arguments included, and what there is, in bytes."""

    required: int
    available: int


_OUT_OF_MEMORY = re.compile(
    r"CompileTimeHbmOom.*?\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    re.DOTALL,
)


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """What a compiler's error says about memory, to its two decimals; None if it is another."""
    match = _OUT_OF_MEMORY.search(str(error))
    if match is None:
        return None
    sizes = [
        int(float(number) * 1024 ** " KMGT".index(unit or " "))
        for number, unit in (match.group(1, 2), match.group(3, 4))
    ]
    return OutOfMemory(*sizes)


def program_cost(schedule: Module) -> ProgramCost:
    """The cost of a program compiled for TPUs.

    Of the branches of a conditional the cheapest counts, for a lower bound; a loop whose length the
    values decide counts as often as it runs at most (`mllama_jax.loops.at_most`), once without it.
    """
    return _gathered(_Walk(schedule).items(schedule.entry, _Place(1.0, False, "")))


@dataclass(frozen=True)
class _Place:
    """Where an instruction stands: runs, whether in an open loop, and the path of the loop."""

    runs: float
    in_open_loop: bool
    path: str

    def within(self, op_name: str) -> str:
        """The whole path of an operation: those of shared computations start in the middle."""
        return op_name if op_name.startswith("jit(") else f"{self.path}/{op_name}"


_Item = Cycles | Unestimated | KernelCall | Collective


class _Walk:
    """Goes through a program as it runs."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._products: dict[str, bool] = {}
        self._paths: dict[str, str] = {}

    def items(self, computation: str, place: _Place) -> Iterator[_Item]:
        for instruction in self._module.computations[computation]:
            opcode = instruction.opcode
            if opcode == "while":
                runs = trip_count(self._module, computation, instruction)
                if runs is None:
                    runs = most_runs(instruction.op_name)
                inside = _Place(
                    place.runs * (1 if runs is None else runs),
                    place.in_open_loop or runs is None,
                    place.within(instruction.op_name),
                )
                yield from self.items(instruction.called, inside)
            elif opcode == "conditional":
                branches = [list(self.items(branch, place)) for branch in instruction.branches]
                yield from min(branches, key=_all_cycles)
            elif opcode == "call":
                yield from self.items(instruction.called, place)
            elif opcode == "async-start":
                for item in self.items(self._started(instruction), place):
                    yield replace(item, overlaps=True) if isinstance(item, Collective) else item
            else:
                yield from self._own(instruction, place)

    def _started(self, start: Instruction) -> str:
        """The computation that goes on beside the program.

        What sparse cores do is behind one more call.
        """
        root = self._module.root(start.called)
        return (root.opcode == "custom-call" and root.called) or start.called

    def _own(self, instruction: Instruction, place: _Place) -> Iterator[_Item]:
        path = place.within(instruction.op_name or self._path(instruction))
        phase = phase_of(path)
        kind = self._kind(instruction)
        part = part_of(path)
        if kind == "copies" and part == OTHER:
            part = COPIES
        cycles = instruction.cycles
        if cycles is None:
            yield Unestimated(part, place.runs, place.in_open_loop)
        elif cycles:
            yield Cycles(part, kind, phase, cycles * place.runs, place.in_open_loop)
        if instruction.attribute("custom_call_target") == "tpu_custom_call":
            constraints = instruction.rest.partition("operand_layout_constraints={")[2]
            operands = arrays(constraints.partition("}}")[0])
            yield KernelCall(
                _kernel_name(path, instruction.name),
                part,
                phase,
                tuple(operands),
                tuple(arrays(instruction.type)),
                place.runs,
                place.in_open_loop,
            )
        found = find_collective(self._module, instruction)
        if found is not None:
            yield replace(
                found, part=part, phase=phase, runs=place.runs, in_open_loop=place.in_open_loop
            )

    def _kind(self, instruction: Instruction) -> Kind:
        opcode = instruction.opcode
        if opcode in ("dot", "convolution"):
            return "products"
        if opcode == "fusion":
            if instruction.called not in self._products:
                self._products[instruction.called] = any(
                    inner.opcode in ("dot", "convolution")
                    for inner in reached(self._module, instruction.called)
                )
            if self._products[instruction.called]:
                return "products"
        return "copies" if "copy" in instruction.name or opcode == "transpose" else "vector"

    def _path(self, instruction: Instruction) -> str:
        """The path that a fusion without one of its own has from what is fused."""
        called = instruction.called if instruction.opcode == "fusion" else ""
        if called not in self._paths:
            inner = reached(self._module, called)
            self._paths[called] = next((i.op_name for i in inner if i.op_name), "")
        return self._paths[called]


_NOT_NAMES = ("pallas_call", "closed_call", "body", "while", "shard_map", "checkpoint")


def _kernel_name(path: str, otherwise: str) -> str:
    """The innermost function that a kernel was traced in."""
    names = (name for name in reversed(path.split("/")) if name and name not in _NOT_NAMES)
    return next(names, otherwise)


def _all_cycles(items: list[_Item]) -> float:
    return sum(item.cycles for item in items if isinstance(item, Cycles))


_AMOUNTS: Mapping[type, str] = {
    Cycles: "cycles",
    Unestimated: "runs",
    KernelCall: "calls",
    Collective: "runs",
}
"""The field of each kind of item that adds up."""


def _gathered(items: Iterator[_Item]) -> ProgramCost:
    """Alike operations together."""
    amounts: dict[Any, float] = defaultdict(float)
    for item in items:
        field = _AMOUNTS[type(item)]
        amounts[_with(item, field, 0.0)] += getattr(item, field)

    def of(kind: type) -> tuple[Any, ...]:
        field = _AMOUNTS[kind]
        return tuple(_with(k, field, v) for k, v in amounts.items() if isinstance(k, kind))

    return ProgramCost(of(Cycles), of(Collective), of(KernelCall), of(Unestimated))


def _with(item: Any, field: str, value: float) -> Any:
    return replace(item, **{field: value})
