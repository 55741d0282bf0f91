"""A lower bound on the time of a step, from what each device computes, reads and sends.

The bound takes the best case of everything that is not known: memory and networks are used at the
data sheet's speed, nothing waits for latency, and whatever the compiler started ahead goes on
while the device computes. What it did not start ahead is waited for.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from jax.sharding import Mesh

from mllama_jax.attention.costs import KernelCost
from mllama_jax.plan.collectives import network_seconds
from mllama_jax.plan.hardware import Chip
from mllama_jax.plan.hlo import KernelCall, ProgramCost
from mllama_jax.plan.parts import COPIES
from mllama_jax.plan.record import Bound, Term
from mllama_jax.plan.topology import Topology

COMPUTE = "compute"
KERNELS = "attention kernels"
WAITING = "network, waited for"
MEMORY = "memory"

_ONE_AFTER_ANOTHER = (COMPUTE, KERNELS, WAITING)
"""Resources whose times add up; the others go on beside them."""

VECTOR_OPERATIONS = 10
"""That come with each exponential of a softmax, as the kernels here are written."""

CostOfKernel = Callable[[KernelCall], KernelCost | None]


def time_bound(
    cost: ProgramCost,
    topology: Topology,
    mesh: Mesh,
    *,
    model_flops: float,
    bytes_read: float,
    cost_of_kernel: CostOfKernel,
) -> Bound:
    """The bound on a step, or on one run of a decoding loop (`ProgramCost.in_open_loop`).

    Args:
        cost: of the program. If the compiler estimates no cycles, as that of GPUs, the operations
            of the formula count instead, as if all ran at the peak.
        mesh: of the topology's devices, that the program was compiled for.
        model_flops: of the step by the model's formula, on all devices together.
        bytes_read: by each device at least once in the step, such as parameters and cache.
        cost_of_kernel: work of one call of a kernel; None if it is not known, and not counted.
    """
    chip = topology.chip
    at_peak = model_flops / topology.num_devices / chip.peak_flops
    terms = [Term("parameters and cache", MEMORY, bytes_read / chip.memory_bandwidth, "estimate")]
    if not cost.cycles:
        terms.append(Term("the model's operations, at the peak", COMPUTE, at_peak, "formula"))
    terms += _summed(_computing(cost, chip))
    terms += _summed(_kernels(cost, chip, cost_of_kernel))
    terms += _summed(_exchanges(cost, topology, mesh))
    resources = by_resource(terms)
    seconds = max(_beside(resources).values())
    return Bound(
        seconds=max(seconds, at_peak),
        terms=tuple(sorted(terms, key=lambda term: -term.seconds)),
        binds=_binding(resources),
        mfu=at_peak / max(seconds, at_peak) if cost.cycles else None,
    )


def by_resource(terms: Iterable[Term]) -> dict[str, float]:
    """Seconds that each resource is used."""
    resources: dict[str, float] = defaultdict(float)
    for term in terms:
        resources[term.resource] += term.seconds
    return dict(resources)


def without_overlap(terms: Iterable[Term]) -> float:
    """Seconds if every exchange between devices were waited for: the bound at its worst."""
    resources = by_resource(terms)
    memory = resources.pop(MEMORY, 0.0)
    return max(sum(resources.values()), memory)


def uncosted(cost: ProgramCost, cost_of_kernel: CostOfKernel) -> tuple[str, ...]:
    """Names of the kernels that the bound leaves out."""
    missing = (call.name for call in cost.kernels if cost_of_kernel(call) is None)
    return tuple(dict.fromkeys(missing))


def _beside(resources: dict[str, float]) -> dict[str, float]:
    """Seconds of what goes on side by side: the device's own work, and each other resource."""
    own = sum(resources.get(name, 0.0) for name in _ONE_AFTER_ANOTHER)
    rest = {name: time for name, time in resources.items() if name not in _ONE_AFTER_ANOTHER}
    return {COMPUTE: own, **rest}


def _binding(resources: dict[str, float]) -> str:
    beside = _beside(resources)
    binds = max(beside, key=beside.__getitem__)
    if binds != COMPUTE:
        return binds
    own = {name: resources.get(name, 0.0) for name in _ONE_AFTER_ANOTHER}
    return max(own, key=own.__getitem__)


def _computing(cost: ProgramCost, chip: Chip) -> Iterator[Term]:
    for item in cost.cycles:
        name = item.part if item.part == COPIES else f"{item.part}: {item.kind}"
        yield Term(name, COMPUTE, item.cycles / chip.clock, "compiler")


def _kernels(cost: ProgramCost, chip: Chip, cost_of_kernel: CostOfKernel) -> Iterator[Term]:
    for call in cost.kernels:
        work = cost_of_kernel(call)
        if work is not None:
            yield Term(call.part, KERNELS, call.calls * kernel_seconds(work, chip), "estimate")


def kernel_seconds(work: KernelCost, chip: Chip) -> float:
    """A call of a kernel that keeps matrix units, vector units and memory busy side by side."""
    return max(
        work.flops / chip.peak_flops,
        work.exponentials / chip.exponentials,
        VECTOR_OPERATIONS * work.exponentials / chip.vector_operations,
        work.bytes / chip.memory_bandwidth,
    )


def _exchanges(cost: ProgramCost, topology: Topology, mesh: Mesh) -> Iterator[Term]:
    for item in cost.collectives:
        axes = ", ".join(item.axes(mesh)) or "no axis"
        between = "between slices" if item.slices > 1 else f"over {axes}"
        resource = f"network {between}" if item.overlaps else WAITING
        seconds = item.runs * network_seconds(item, topology, mesh)
        yield Term(f"{item.operation} {between}", resource, seconds, "estimate")


def _summed(terms: Iterable[Term]) -> list[Term]:
    """One term for each part, resource and source."""
    seconds: dict[Term, float] = defaultdict(float)
    for term in terms:
        seconds[Term(term.part, term.resource, 0.0, term.source)] += term.seconds
    return [Term(k.part, k.resource, v, k.source) for k, v in seconds.items() if v]
