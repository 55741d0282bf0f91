"""A compiled program's text, taken apart: computations, their instructions, and loops."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)", re.DOTALL)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")  # no shape or layout has a space before a parenthesis
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FAILED = 2**63 - 1  # what the compiler writes for an estimate that it could not make
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls=|to_apply=|body=|called_computations=\{)%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclass
class Instruction:
    """One line of a computation.

    Attributes:
        name: without the percent sign.
        type: of the result, with layouts.
        opcode: such as "fusion".
        rest: what follows the opcode: operands and attributes.
        is_root: its result is the computation's.
    """

    name: str
    type: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; 0 where it makes none, None where it failed to."""
        match = _CYCLES.search(self.rest)
        cycles = int(match[1]) if match else 0
        return None if cycles == _FAILED else cycles

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from; empty if nothing says."""
        match = _OP_NAME.search(self.rest)
        return match[1] if match else ""

    @property
    def operands(self) -> list[str]:
        return _NAMES.findall(self.rest[: self.rest.find(")")])

    @property
    def called(self) -> str:
        """The computation of a fusion, call, custom call or loop; empty if there is none."""
        match = _CALLED.search(self.rest)
        return match[1] if match else ""

    @property
    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        found = _BRANCHES.findall(self.rest)
        return [name for group, one in found for name in (_NAMES.findall(group) or [one])]

    def attribute(self, name: str) -> str:
        """A word or number, such as the index of a get-tuple-element; empty if absent."""
        match = re.search(rf'\b{name}="?%?([\w.\-]+)', self.rest)
        return match[1] if match else ""


@dataclass
class Module:
    """All computations of a program by name, and which of them is the program."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    def root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation] if i.is_root)

    def find(self, computation: str, name: str) -> Instruction:
        return self._by_name[computation][name]

    @cached_property
    def _by_name(self) -> dict[str, dict[str, Instruction]]:
        return {
            computation: {i.name: i for i in instructions}
            for computation, instructions in self.computations.items()
        }


def parse_module(text: str) -> Module:
    """Takes a program's text apart.

    Raises:
        ValueError: it is not the text of a compiled program.
    """
    module = Module()
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            match = _INSTRUCTION.match(line)
            opcode = _OPCODE.search(match[3]) if match else None
            if match is not None and opcode is not None and current is not None:
                kind, rest = match[3][: opcode.start()], match[3][opcode.end() :]
                current.append(Instruction(match[2], kind, opcode[1], rest, bool(match[1])))
                continue
        elif line == "}":  # kernels' strings have lines of their own that begin with one
            current = None
            continue
        elif line.endswith("{") and (header := _COMPUTATION.match(line)):
            current = module.computations.setdefault(header[2], [])
            if header[1]:
                module.entry = header[2]
            continue
        if current:  # strings in kernels hold newlines
            current[-1].rest += "\n" + line
    if not module.entry:
        raise ValueError("not the text of a compiled program: it has no entry computation")
    return module


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array in the text of a type."""
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(text)
    ]


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Of an array, without padding."""
    bits = _BITS.search(dtype)
    return math.ceil(math.prod(shape) * (int(bits[0]) if bits else 8) / 8)


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often a while loop of a computation runs; None where its values decide."""
    condition = loop.attribute("condition")
    comparison = _plain_root(module, condition)
    if comparison is None or comparison[0].opcode != "compare":
        return None
    compare, values = comparison
    index, limit = (_value(module, condition, name) for name in values)
    direction = compare.attribute("direction")
    if isinstance(index, int) and isinstance(limit, _Index):
        index, limit, direction = limit, index, _MIRRORED.get(direction, direction)
    if not (isinstance(index, _Index) and isinstance(limit, int)):
        return None
    start = _start(module, computation, loop, index)
    step = _step(module, loop.called, index)
    span = {"LT": limit - start, "LE": limit + 1 - start, "NE": limit - start}.get(direction)
    if span is None:
        span = {"GT": limit - start, "GE": limit - 1 - start}.get(direction)
    return None if span is None else max(0, math.ceil(span / step))


@dataclass(frozen=True)
class _Index:
    """An element of the tuple that a loop carries."""

    index: int


_MIRRORED = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}
_TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")


def _plain_root(module: Module, computation: str) -> tuple[Instruction, list[str]] | None:
    """A computation's root and its operands; a fusion's instruction with the fusion's operands."""
    root = module.root(computation)
    if root.opcode != "fusion":
        return root, root.operands
    return _inside(module, root)


def _inside(module: Module, fusion: Instruction) -> tuple[Instruction, list[str]] | None:
    """The root of a fusion, its operands named as outside; None if it has any but arguments."""
    inner = module.root(fusion.called)
    names = []
    for operand in (module.find(fusion.called, name) for name in inner.operands):
        if operand.opcode == "parameter":
            names.append(fusion.operands[int(operand.rest[: operand.rest.find(")")])])
        elif operand.opcode == "constant":
            names.append("=" + operand.rest[: operand.rest.find(")")])
        else:
            return None
    return inner, names


def _value(module: Module, computation: str, name: str) -> "_Index | int | None":
    """What an operand is: a constant or an element of the computation's argument."""
    if name.startswith("="):
        return _integer(name[1:])
    instruction = module.find(computation, name)
    while instruction.opcode in _TRANSPARENT:
        instruction = module.find(computation, instruction.operands[0])
    if instruction.opcode == "constant":
        return _integer(instruction.rest[: instruction.rest.find(")")])
    if instruction.opcode == "get-tuple-element":
        source = module.find(computation, instruction.operands[0])
        if source.opcode == "parameter":
            return _Index(int(instruction.attribute("index")))
    return None


def _start(module: Module, computation: str, loop: Instruction, index: _Index) -> int:
    """A loop's first index; 0, as nearly all loops have, where the text does not say."""
    initial = module.find(computation, loop.operands[0])
    if initial.opcode != "tuple":
        return 0
    value = _value(module, computation, initial.operands[index.index])
    return value if isinstance(value, int) else 0


def _step(module: Module, body: str, index: _Index) -> int:
    """What a loop adds to its index; 1, as nearly all loops do, where the text does not say."""
    root = module.root(body)
    if root.opcode != "tuple":
        return 1
    following = module.find(body, root.operands[index.index])
    while following.opcode in _TRANSPARENT:
        following = module.find(body, following.operands[0])
    operands: list[str] = following.operands
    if following.opcode == "fusion":
        plain = _inside(module, following)
        if plain is None:
            return 1
        following, operands = plain
    if following.opcode not in ("add", "subtract"):
        return 1
    values = [_value(module, body, name) for name in operands]
    step = next((value for value in values if isinstance(value, int)), 1)
    return (-step if following.opcode == "subtract" else step) or 1


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def reached(module: Module, computation: str) -> Iterator[Instruction]:
    """The instructions of a fused computation and of those that it calls."""
    for instruction in module.computations.get(computation, ()):
        yield instruction
        if instruction.opcode in ("fusion", "call"):
            yield from reached(module, instruction.called)
