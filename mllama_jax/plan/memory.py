"""What of a chip's memory goes where: counted from the arguments, measured by the compiler."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from mllama_jax.plan.programs import Program, bytes_a_device
from mllama_jax.plan.record import Amount, Buffer, Memory

_NUM_BUFFERS = 12
_LEAST_PADDING = 2**20
HELD = "parameters of other programs"


def counted(program: Program, usable: int) -> Memory:
    """What is needed at least: the arguments, and what lies beside them."""
    return Memory(usable, tuple(_arguments(program)))


def measured(program: Program, stats: Any, usable: int) -> Memory:
    """All of a compiled program's memory, from the compiler's own account of it."""
    amounts = list(_arguments(program))
    arguments = sum(amount.bytes for amount in amounts if amount.kind != HELD)
    padding = stats.argument_size_in_bytes - arguments
    if padding >= _LEAST_PADDING:
        amounts.append(Amount("padding of arguments", padding, "compiler"))
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    rest = {
        "temporaries": stats.temp_size_in_bytes,
        "results": results,
        "code": stats.generated_code_size_in_bytes,
    }
    amounts += [Amount(kind, size, "compiler") for kind, size in rest.items() if size > 0]
    return Memory(usable, tuple(amounts))


def refused(program: Program, required: int, usable: int) -> Memory:
    """Of a program that the compiler refused because it takes ``required`` bytes."""
    amounts = list(_arguments(program))
    arguments = sum(amount.bytes for amount in amounts if amount.kind != HELD)
    # The compiler's figure is rounded; what it refuses is too much.
    rest = max(required, usable + 1) - arguments
    return Memory(usable, (*amounts, Amount("temporaries and results", rest, "compiler")))


def _arguments(program: Program) -> Iterator[Amount]:
    for kind, tree in program.kinds.items():
        yield Amount(kind, bytes_a_device(tree), "shapes")
    if program.held:
        yield Amount(HELD, bytes_a_device(program.held), "shapes")


def bytes_read(program: Program) -> int:
    """By each device at least once in a step: the arguments, of embeddings only what is looked up.

    What a step replaces, as training does with parameters and the optimizer's state, is written,
    too.
    """
    total = 0
    for kind, tree in program.kinds.items():
        times = 2 if kind in program.replaced else 1
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            looked_up = "embed_tokens" in jax.tree_util.keystr(path) and times == 1
            total += 0 if looked_up else times * bytes_a_device(leaf)
    return total


def largest_arguments(program: Program) -> list[Buffer]:
    """The arguments that take most of each device, first the largest."""
    buffers = []
    for kind, tree in program.kinds.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{kind}: {jax.tree_util.keystr(path, simple=True, separator='/')}"
            shape = leaf.sharding.shard_shape(leaf.shape)
            size = bytes_a_device(leaf)
            buffers.append(Buffer(name.rstrip(": "), type_text(leaf.dtype, shape), size, "shapes"))
    return sorted(buffers, key=lambda buffer: -buffer.bytes)[:_NUM_BUFFERS]


def type_text(dtype: Any, shape: Sequence[int]) -> str:
    """Such as ``bfloat16[8,1601]``."""
    return f"{dtype}[{','.join(map(str, shape))}]"
