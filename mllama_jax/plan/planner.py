"""From a job to a plan: compile the job's own program for its devices, and read the result."""

import time
from functools import partial
from pathlib import Path

import jax

from mllama_jax.configs import MllamaConfig
from mllama_jax.flops import total
from mllama_jax.plan import store
from mllama_jax.plan.advice import advice
from mllama_jax.plan.bounds import time_bound, uncosted
from mllama_jax.plan.compiling import CompiledProgram, compile_program
from mllama_jax.plan.estimate import estimated_temporaries
from mllama_jax.plan.flops import job_flops
from mllama_jax.plan.hlo import OutOfMemory, out_of_memory, program_cost
from mllama_jax.plan.hlo_text import Module
from mllama_jax.plan.job import Job, resolved
from mllama_jax.plan.kernels import kernel_cost
from mllama_jax.plan.memory import bytes_read, counted, largest_arguments, measured, refused
from mllama_jax.plan.models import find_config
from mllama_jax.plan.programs import Program, build_program
from mllama_jax.plan.progress import reported
from mllama_jax.plan.recipes import recipe_flops
from mllama_jax.plan.record import Bound, Plan, Rate, Work
from mllama_jax.plan.search import Search, run_search
from mllama_jax.plan.temporaries import largest_temporaries
from mllama_jax.plan.topology import Topology, parse_topology
from mllama_jax.sharding import describe, num_parts


def plan(job: Job, *, folder: Path | None = None, quiet: bool = True) -> Plan:
    """What a job takes and how fast it can be at best, by compiling it without its devices.

    ::

        answer = plan(Job(model="11b", task="lora", topology="v5e:2x4"))
        print(answer.fits, answer.memory.needed / 2**30, answer.bound.mfu)

    Compiling a full-size training step takes minutes. Nothing is compiled if the arguments alone
    are more than a chip holds. JAX must not look for accelerators of this machine in the same
    process: set ``JAX_PLATFORMS=cpu``, or call `mllama_jax.plan.topology.prepare_environment`.

    Args:
        job: fields that are None are filled in; see `mllama_jax.plan.job.resolved`.
        folder: where plans are kept, and found instead of compiling again; None for nowhere.
        quiet: say nothing on standard error while it compiles.

    Raises:
        ImportError: the TPU compiler is not installed.
        ValueError: the topology is unknown; the mesh is not made of its devices, or does not
            divide the parameters or the batch; the model is unknown; the compiler refuses the
            program, other than for its memory.
    """
    topology = parse_topology(job.topology)
    config = find_config(job.model)
    job, mesh = resolved(job, config, topology)
    key = store.key_of(job, config)
    if folder is not None and (found := store.load(folder, key)) is not None:
        return found
    program = build_program(job, config, mesh)
    made = _answer(job, config, topology, program, quiet)
    if folder is not None:
        store.save(folder, key, made)
    return made


def search(
    job: Job, *, max_compiles: int = 8, folder: Path | None = None, quiet: bool = True
) -> Search:
    """The largest batch and the cheapest rematerialisation that fit.

    Args:
        job: its ``batch`` and, in training, its ``remat`` are looked for where they are None.
        max_compiles: after so many the search ends with what it has.
        folder, quiet: see `plan`.

    Raises:
        ImportError, ValueError: as `plan`.
    """
    _, mesh = resolved(job, find_config(job.model), parse_topology(job.topology))
    groups = num_parts("batch", 0, mesh)
    return run_search(job, groups, partial(plan, folder=folder, quiet=quiet), max_compiles)


def _answer(
    job: Job, config: MllamaConfig, topology: Topology, program: Program, quiet: bool
) -> Plan:
    usable = topology.chip.usable_bytes
    memory = counted(program, usable)
    buffers = largest_arguments(program)
    flops = recipe_flops(job, program.model) if job.config else job_flops(job, config)
    bound: Bound | None = None
    notes: tuple[str, ...] = ()
    seconds = None
    if memory.fits:
        started = time.monotonic()
        with reported(f"compiling {job.model} {job.task} for {topology.name}", quiet):
            compiled = _compile(job, program)
        seconds = round(time.monotonic() - started, 1)
        if isinstance(compiled, OutOfMemory):
            memory = refused(program, compiled.required, usable)
            buffers += estimated_temporaries(job, config, program)
        else:
            memory = measured(program, compiled.memory, usable)
            buffers += largest_temporaries(compiled.schedule)
            bound, notes = _bound(job, compiled.schedule, topology, program, total(flops))
    mesh = program.model.mesh
    assert mesh is not None
    return Plan(
        job=job,
        chip=topology.chip.title,
        chips=topology.num_chips,
        mesh=describe(mesh),
        memory=memory,
        buffers=tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)),
        work=tuple(Work(part, piece.total) for part, piece in flops.items()),
        bound=bound,
        rates=() if bound is None else _rates(job, bound.seconds),
        advice=advice(job, mesh, memory),
        notes=notes,
        compile_seconds=seconds,
        versions=store.versions(),
    )


def _compile(job: Job, program: Program) -> CompiledProgram | OutOfMemory:
    try:
        return compile_program(program.lower())
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(error)
        if found is None:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the compiler refuses the {job.task} program for {job.topology}, of "
                f"{job.dtype} and {job.attention} attention: {reason}"
            ) from error
        return found


def _bound(
    job: Job,
    schedule: Module,
    topology: Topology,
    program: Program,
    flops: float,
) -> tuple[Bound, tuple[str, ...]]:
    """The bound, and what it leaves out."""
    cost = program_cost(schedule)
    notes = []
    if job.task == "decode":
        cost = cost.in_open_loop()
    elif cost.has_open_loops:
        notes.append("the bound counts a loop once whose length could not be read")
    if not cost.cycles:
        notes.append(
            "this compiler estimates no cycles: the bound is that of the model's operations at the "
            "peak, of memory and of the network"
        )
    if cost.unestimated:
        parts = ", ".join(dict.fromkeys(item.part for item in cost.unestimated))
        runs = sum(item.runs for item in cost.unestimated)
        notes.append(
            f"the compiler failed to estimate {runs:,.0f} runs of operations ({parts}): the bound "
            "leaves them out"
        )
    if missing := uncosted(cost, kernel_cost):
        notes.append(f"the bound leaves out these kernels: {', '.join(missing)}")
    assert program.model.mesh is not None
    bound = time_bound(
        cost,
        topology,
        program.model.mesh,
        model_flops=flops,
        bytes_read=bytes_read(program),
        cost_of_kernel=kernel_cost,
    )
    return bound, tuple(notes)


def _rates(job: Job, seconds: float) -> tuple[Rate, ...]:
    """First the samples (rows, pictures) a second, by which plans of one task are compared."""
    samples, tokens = (job.batch or 0) / seconds, (job.batch or 0) * (job.length or 0) / seconds
    if job.task == "decode":
        return (Rate("tokens/s", samples), Rate("ms a token", 1e3 * seconds))
    if job.task == "vision":
        return (Rate("images/s", samples),)
    if job.task == "prefill":
        return (Rate("prompts/s", samples), Rate("tokens/s", tokens))
    return (Rate("samples/s", samples), Rate("tokens/s", tokens))
