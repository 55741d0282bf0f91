"""The largest arrays that a compiled program makes on the way, from the text of its schedule."""

from mllama_jax.plan.hlo_text import Instruction, Module, arrays, num_bytes
from mllama_jax.plan.parts import part_of
from mllama_jax.plan.record import Buffer

_NUM_BUFFERS = 8
_NO_NEW_ARRAY = (
    *("parameter", "get-tuple-element", "tuple", "bitcast"),
    *("while", "conditional", "call"),
)
_FAST_MEMORY = "S(1)"


def largest_temporaries(module: Module) -> list[Buffer]:
    """One for each dtype and shape that no argument has, the largest first."""
    given = {
        array
        for instruction in module.computations[module.entry]
        if instruction.opcode == "parameter"
        for array in arrays(instruction.type)
    }
    fused = {
        instruction.called
        for instructions in module.computations.values()
        for instruction in instructions
        if instruction.opcode == "fusion"
    }
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    for computation, instructions in module.computations.items():
        if computation in fused:
            continue
        for instruction in instructions:
            if instruction.opcode in _NO_NEW_ARRAY or _FAST_MEMORY in instruction.type:
                continue
            for array in arrays(instruction.type):
                if array not in given:
                    names[array] = names.get(array) or _name(instruction)
    largest = sorted(names, key=lambda array: -num_bytes(*array))[:_NUM_BUFFERS]
    return [
        Buffer(
            names[array] or "temporary",
            f"{array[0]}[{','.join(map(str, array[1]))}]",
            num_bytes(*array),
            "compiler",
        )
        for array in largest
    ]


def _name(instruction: Instruction) -> str:
    """The part of the model and the operation; empty if the compiler made the array for itself."""
    path = instruction.op_name
    return f"{part_of(path)}: {'/'.join(path.split('/')[-2:])}" if path else ""
