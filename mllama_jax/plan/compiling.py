"""Compiles a program for devices that are not there, and keeps what the compiler writes of it."""

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mllama_jax.plan.hlo_text import Module, parse_module

_SCHEDULE = re.compile(r".*\.(after_codegen|sm_\w+\.\w+_gpu_after_optimizations)\.txt")
"""Names of the files that the compilers of TPUs and of NVIDIA GPUs write it to."""


class CompiledProgram(NamedTuple):
    """Attributes:
    memory: what it takes of each device, as `jax.stages.Compiled.memory_analysis` says.
    schedule: what each device does, in its order, with the compiler's estimates of cycles.
    """

    memory: Any
    schedule: Module


def compile_program(lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compiles for the devices that the arguments are placed on.

    The schedule is read from the file that the compiler writes as it goes. Asked for the text
    afterwards, it fails for programs that start operations of several operands ahead, as most
    large ones do.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses the program.
    """
    with tempfile.TemporaryDirectory(prefix="mllama_jax_plan_") as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (file,) = (file for file in Path(folder).iterdir() if _SCHEDULE.fullmatch(file.name))
        schedule = parse_module(file.read_text(errors="replace"))
    return CompiledProgram(compiled.memory_analysis(), schedule)
