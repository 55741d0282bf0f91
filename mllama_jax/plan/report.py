"""Plans as text: a table that a person decides from."""

from collections.abc import Mapping, Sequence

from mllama_jax.cli.tables import columns, indented
from mllama_jax.plan.bounds import without_overlap
from mllama_jax.plan.job import Job
from mllama_jax.plan.record import GIB, SOURCES, Plan, Source
from mllama_jax.plan.search import Search

_WORDS: Mapping[Source, str] = {
    source: meaning.partition(":")[0] for source, meaning in SOURCES.items()
}
_SHOWN_BUFFERS = 6


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    needed, usable = plan.memory.needed / GIB, plan.memory.usable / GIB
    if plan.fits:
        return f"fits: {needed:.2f} of {usable:.2f} GiB a chip, {usable - needed:.2f} to spare"
    least = "" if plan.memory.complete else "at least "
    return (
        f"does not fit: needs {least}{needed:.2f} of {usable:.2f} GiB a chip, "
        f"{needed - usable:.2f} too much"
    )


def workload(job: Job) -> str:
    """What is computed, in a line."""
    images = _count(job.images, "image")
    shown = {
        "train": f"{_count(job.batch, 'sample')} of {job.length} tokens and {images}",
        "prefill": f"{_count(job.batch, 'prompt')} of {job.length} tokens and {images}",
        "decode": f"{_count(job.batch, 'row')} of {job.length} cached tokens and {images}",
        "vision": _count(job.batch, "picture"),
    }
    shown["lora"] = f"{shown['train']}; adapters of rank {job.rank}"
    words = [shown[job.task], f"{job.dtype} computation", f"{job.param_dtype} parameters"]
    if job.trains:
        words.append(f"remat {job.remat}")
        if job.quantise:
            words.append(f"{job.quantise} weights in the decoder's layers")
        if job.images_at_once:
            words.append(f"{_count(job.images_at_once, 'image')} at once on a chip")
    return "; ".join([*words, f"{job.attention} attention"])


def report(plan: Plan) -> str:
    """One plan, all of it."""
    job = plan.job
    head = [
        f"{job.model} {job.task} on {job.topology} ({_count(plan.chips, 'chip')}, {plan.chip}): "
        f"{verdict(plan)}",
        f"  {workload(job)}",
        f"  {plan.mesh}",
    ]
    sections = ["\n".join(head), _memory(plan)]
    if plan.buffers:
        sections.append(_buffers(plan))
    if plan.advice:
        sections.append("What would help\n" + "\n".join(f"  - {line}" for line in plan.advice))
    sections += [_work(plan), _time(plan), _footnotes(plan)]
    return "\n\n".join(sections)


def comparison(plans: Sequence[Plan]) -> str:
    """Several plans side by side."""
    kinds = list(dict.fromkeys(a.kind for plan in plans for a in plan.memory.amounts))
    resources = list(
        dict.fromkeys(t.resource for plan in plans if plan.bound for t in plan.bound.terms)
    )
    units = list(dict.fromkeys(rate.unit for plan in plans for rate in plan.rates))
    rows: list[list[str]] = [["", *(plan.job.topology for plan in plans)]]

    def add(name: str, *cells: str) -> None:
        rows.append([name, *cells])

    add("chips", *(f"{plan.chips}" for plan in plans))
    add("mesh", *(plan.job.mesh or "" for plan in plans))
    add("batch", *(f"{plan.job.batch}" for plan in plans))
    add("fits", *("yes" if plan.fits else "no" for plan in plans))
    for kind in kinds:
        found = [{a.kind: a.bytes for a in plan.memory.amounts}.get(kind) for plan in plans]
        add(f"{kind}, GiB a chip", *("-" if n is None else f"{n / GIB:.2f}" for n in found))
    add("needed", *(("" if p.memory.complete else "> ") + _gib(p.memory.needed) for p in plans))
    add("usable", *(_gib(plan.memory.usable) for plan in plans))
    add("TFLOP a step", *(f"{plan.flops / 1e12:.1f}" for plan in plans))
    for resource in resources:
        times = [_seconds_of(plan, resource) for plan in plans]
        add(f"{resource}, ms", *("-" if t is None else f"{1e3 * t:.2f}" for t in times))
    bounds = [plan.bound for plan in plans]
    add(
        "step takes at least, ms", *("-" if b is None else f"{1e3 * b.seconds:.2f}" for b in bounds)
    )
    add("binding", *("-" if b is None else b.binds for b in bounds))
    mfus = [None if b is None else b.mfu for b in bounds]
    add("MFU at most", *("-" if mfu is None else f"{mfu:.0%}" for mfu in mfus))
    for unit in units:
        values = [{r.unit: r.value for r in plan.rates}.get(unit) for plan in plans]
        add(f"{unit} {_limit(unit)}", *("-" if v is None else _number(v) for v in values))
    job = plans[0].job
    title = f"{job.model} {job.task}: {workload(job).partition('; ')[2]}"
    table = columns(rows, right=range(1, len(plans) + 1))
    notes = "".join(f"{plan.job.topology}: {note}.\n" for plan in plans for note in plan.notes)
    return f"{title}\n\n{indented(table)}\n\n{notes}{_legend(plans)}"


def trials(search: Search) -> str:
    """What a search tried, in its order, and what it found."""
    rows: list[tuple[str, ...]] = [("batch", "remat", "GiB a chip", "fits", "at most", "")]
    best = search.best
    for plan in search.trials:
        rate = plan.rates[0] if plan.rates else None
        rows.append(
            (
                f"{plan.job.batch}",
                f"{plan.job.remat}",
                ("" if plan.memory.complete else "> ") + _gib(plan.memory.needed),
                "yes" if plan.fits else "no",
                "-" if rate is None else f"{_number(rate.value)} {rate.unit}",
                "<- best" if plan is best else "",
            )
        )
    job = search.trials[0].job
    usable = _gib(search.trials[0].memory.usable)
    title = f"Tried for {job.model} {job.task} on {job.topology} ({usable} GiB a chip usable)"
    return f"{title}\n{indented(columns(rows, right=(0, 2, 4)))}\n"


def _seconds_of(plan: Plan, resource: str) -> float | None:
    if plan.bound is None:
        return None
    return sum(term.seconds for term in plan.bound.terms if term.resource == resource)


def _memory(plan: Plan) -> str:
    amounts = sorted(plan.memory.amounts, key=lambda amount: -amount.bytes)
    rows = [(a.kind, _gib(a.bytes), _WORDS[a.source]) for a in amounts]
    least = "" if plan.memory.complete else " at least"
    rows += [
        (f"needed{least}", _gib(plan.memory.needed), ""),
        ("usable", _gib(plan.memory.usable), ""),
    ]
    return "Memory, GiB a chip\n" + indented(columns(rows, right=(1,)))


def _buffers(plan: Plan) -> str:
    rows = [
        (buffer.name, buffer.type, _gib(buffer.bytes), _WORDS[buffer.source])
        for buffer in plan.buffers[:_SHOWN_BUFFERS]
    ]
    return "Largest arrays, GiB a chip\n" + indented(columns(rows, right=(2,)))


def _work(plan: Plan) -> str:
    rows = [(work.part, _tera(work.flops), "") for work in plan.work if work.flops]
    rows.append(("all", _tera(plan.flops), _WORDS["formula"]))
    return "Operations of a step on all chips, TFLOP\n" + indented(columns(rows, right=(1,)))


def _time(plan: Plan) -> str:
    bound = plan.bound
    if bound is None:
        why = "the compiler refused the program"
        if plan.compile_seconds is None:
            why = "nothing was compiled, for the arguments alone are too large"
        return f"No bound on a step's time: {why}."
    terms = sorted(bound.terms, key=lambda term: -term.seconds)
    rows = [(t.part, t.resource, _ms(t.seconds), _WORDS[t.source]) for t in terms]
    rows.append(("at least", f"{bound.binds} binds", _ms(bound.seconds), ""))
    rates = [f"{_limit(rate.unit)} {_number(rate.value)} {rate.unit}" for rate in plan.rates]
    mfu = "MFU not known" if bound.mfu is None else f"MFU at most {bound.mfu:.1%}"
    told = "; ".join([mfu, *rates])
    apart = without_overlap(bound.terms)
    if apart > bound.seconds:
        told += f"\n  if no exchange between chips were hidden: at least {_ms(apart)} ms"
    title = "Lower bound on a step's time, ms (hardware takes longer)"
    return f"{title}\n{indented(columns(rows, right=(2,)))}\n  {told}"


def _limit(unit: str) -> str:
    """Times are bounded from below, rates from above."""
    return "at least" if unit.startswith("ms ") else "at most"


def _footnotes(plan: Plan) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    compiled = "Not compiled"
    if plan.compile_seconds is not None:
        compiled = f"Compiled in {plan.compile_seconds:.0f} s"
    notes = "".join(f"Note: {note}.\n" for note in plan.notes)
    return f"{notes}{compiled} ({versions}).\n{_legend([plan])}"


def _legend(plans: Sequence[Plan]) -> str:
    used: set[str] = {amount.source for plan in plans for amount in plan.memory.amounts}
    used |= {term.source for plan in plans if plan.bound for term in plan.bound.terms}
    used |= {buffer.source for plan in plans for buffer in plan.buffers} | {"formula"}
    return "\n".join(meaning for source, meaning in SOURCES.items() if source in used)


def _count(number: int | None, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
