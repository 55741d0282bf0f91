"""What to change in a job that does not fit."""

import math
from collections.abc import Iterator

from jax.sharding import Mesh

from mllama_jax.plan.job import Job
from mllama_jax.plan.record import GIB, Memory
from mllama_jax.sharding import num_parts

_FOR_TEMPORARIES = 0.35
_STATE = (
    *("parameters", "frozen parameters", "adapters", "optimizer state"),
    "parameters of other programs",
)
_SETTINGS = {
    "--task lora": "trained.preset=lora",
    "--param-dtype ": "model.param_dtype=",
    "--quantise ": "model.quantise=",
    "--remat ": "model.remat=",
    "--attention ": "model.attention=",
    "--images-at-once ": "model.images_at_once=",
    "--batch ": "data.batch_size=",
    "--length ": "data.lengths up to ",
    "--mesh ": "mesh ",
}
"""What options are called in a run's configuration."""


def advice(job: Job, mesh: Mesh, memory: Memory) -> tuple[str, ...]:
    """Changes in the order in which to try them."""
    hints = () if memory.fits else _hints(job, mesh, memory)
    return tuple(map(_as_setting, hints)) if job.config else hints


def _as_setting(hint: str) -> str:
    for option, setting in _SETTINGS.items():
        hint = hint.replace(option, setting)
    return hint


def _hints(job: Job, mesh: Mesh, memory: Memory) -> tuple[str, ...]:
    amounts = {amount.kind: amount.bytes for amount in memory.amounts}
    state = sum(amounts.get(kind, 0) for kind in _STATE)
    hints = list(_less_state(job, mesh)) if state > 0.6 * memory.usable else []
    hints += _less_of_the_rest(job, mesh, memory, state)
    if state > memory.usable:  # nothing but less of it, or more chips, helps
        hints = list(_less_state(job, mesh))
    return (*hints, _more_chips(job, mesh, memory, state))


def _less_state(job: Job, mesh: Mesh) -> Iterator[str]:
    generates = job.task in ("prefill", "decode")
    has_adapters_beside = job.task == "lora" and job.config is not None
    if (generates or has_adapters_beside) and job.quantise != "nf4":
        if job.quantise is None:
            yield "--quantise int8: 8 bits for each weight of the decoder's layers, nearly exact"
        yield "--quantise nf4: 4.5 bits for each of these weights, less exact"
    if mesh.shape.get("data", 1) > 1 and job.trains:
        yield "--mesh with less data and more fsdp: data holds all parameters once for each group"
    if job.task == "train":
        yield "--task lora: frozen parameters need no gradients and no optimizer state"
        if job.param_dtype == "float32":
            yield "--param-dtype bfloat16: halves parameters and AdamW's moments, less exact"
    elif job.param_dtype == "float32":
        yield "--param-dtype bfloat16: halves the parameters"
    elif mesh.shape.get("data", 1) > 1:
        yield f"--mesh tensor={mesh.size}: every chip holds a smaller part of the parameters"


def _less_of_the_rest(job: Job, mesh: Mesh, memory: Memory, state: int) -> Iterator[str]:
    groups = num_parts("batch", 0, mesh)
    batch, length = job.batch or 1, job.length or 0
    # As if all but the parameters and what belongs to them grew with the batch.
    room = batch * (memory.usable - state) / (memory.needed - state)
    if job.trains and job.remat != "full":
        yield "--remat full: keeps only each layer's input for the backward pass"
    if job.attention in ("xla", "reference") and mesh.devices.flat[0].platform == "tpu":
        yield "--attention splash: no scores in memory"
    if batch > groups:
        fewer = max(groups, int(room) // groups * groups)
        yield f"--batch {fewer}: fewer samples at once"
    if job.trains and (job.images_at_once or batch // groups * job.images) > 1:
        yield "--images-at-once 1: each chip encodes one picture after the other"
    if length > 1:
        what = "a shorter cache" if job.task == "decode" else "less text"
        yield f"--length {length // 2}: {what}"


def _more_chips(job: Job, mesh: Mesh, memory: Memory, state: int) -> str:
    """What is split over all chips shrinks with their number."""
    data = mesh.shape.get("data", 1)
    spare = memory.usable - (memory.needed - state)
    if not memory.complete:  # what the program makes on the way is not known yet
        spare -= int(_FOR_TEMPORARIES * memory.usable)
    if spare <= 0:
        return "a topology with more memory a chip, such as v5p"
    chips = 2 ** math.ceil(math.log2(mesh.size * state / spare))
    axis = "fsdp" if job.trains else "tensor"
    return (
        f"more chips: about {max(chips, 2 * mesh.size // data)} with everything split over {axis}, "
        f"or chips with more than {memory.needed / GIB:.0f} GiB"
    )
