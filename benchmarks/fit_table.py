"""Makes the table in docs/plan.md: which jobs fit which slices, and what they can reach at best.

    python benchmarks/fit_table.py --limit 5        # the next five cells that are not there yet
    python benchmarks/fit_table.py --only "90b lora v6e"
    python benchmarks/fit_table.py --table          # only writes the table anew

A cell whose parameters do not fit costs seconds, a full-size training step minutes on two cores.
Finished cells are kept in docs/fit_table.json, one plan a line, so a run that was stopped goes on.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from mllama_jax.plan import Job, Plan, plan
from mllama_jax.plan.hardware import CHIPS
from mllama_jax.plan.record import GIB
from mllama_jax.plan.topology import prepare_environment

DOCS = Path(__file__).parents[1] / "docs"
PLANS, PAGE = DOCS / "fit_table.json", DOCS / "plan.md"
BEGIN, END = "<!-- fit table -->", "<!-- end of fit table -->"
JOBS = [(model, task) for model in ("11b", "90b") for task in ("train", "lora", "decode")]
SLICES = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {8: "2x2x2", 16: "2x2x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
    "h100": {8: "8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="words that a cell's name must have, such as '11b v5e:4x4'")
    parser.add_argument("--limit", type=int, help="make at most so many new cells")
    parser.add_argument("--redo", action="store_true", help="make cells anew that are there")
    parser.add_argument("--table", action="store_true", help="make no cell, write the table")
    options = parser.parse_args()
    prepare_environment()
    known = read()
    wanted = [name for name in cells() if all(w in name for w in (options.only or "").split())]
    if not options.redo:
        wanted = [name for name in wanted if name not in known]
    for name in [] if options.table else wanted[: options.limit]:
        print(f"{name} ({wanted.index(name) + 1} of {len(wanted)} left)", file=sys.stderr)
        known[name] = (str(datetime.date.today()), plan(job_of(name), quiet=False))
        write(known)
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(known)}\n{END}{after}")


def cells() -> Iterator[str]:
    """Such as "11b train v5e:4x4", in the table's order."""
    for model, task in JOBS:
        for generation, shapes in SLICES.items():
            for shape in shapes.values():
                yield f"{model} {task} {generation}:{shape}"


def job_of(name: str) -> Job:
    model, task, topology = name.split()
    return Job(model=model, task=task, topology=topology)  # type: ignore[arg-type]


def read() -> dict[str, tuple[str, Plan]]:
    if not PLANS.exists():
        return {}
    lines = map(json.loads, PLANS.read_text().splitlines())
    return {line["cell"]: (line["date"], Plan.from_json(line["plan"])) for line in lines}


def write(known: dict[str, tuple[str, Plan]]) -> None:
    """In the table's order, whatever order the cells were made in."""
    lines = [
        json.dumps({"cell": name, "date": known[name][0], "plan": known[name][1].to_json()})
        for name in cells()
        if name in known
    ]
    unfinished = PLANS.with_suffix(".part")
    unfinished.write_text("\n".join(lines) + "\n")
    unfinished.replace(PLANS)


def table(known: dict[str, tuple[str, Plan]]) -> str:
    """One Markdown table for each generation, chips downwards, jobs across."""
    parts = []
    for generation, shapes in SLICES.items():
        head = ["chips", *(f"{model} {task}" for model, task in JOBS)]
        rows = [head, ["---"] * len(head)]
        for chips, shape in shapes.items():
            names = [f"{model} {task} {generation}:{shape}" for model, task in JOBS]
            rows.append([f"{chips} ({shape})", *(cell(known, name) for name in names)])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"### {CHIPS[generation].title}\n\n{lines}")
    dates = sorted({date for date, _ in known.values()})
    versions = sorted({json.dumps(dict(found.versions)) for _, found in known.values()})
    made = [", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in versions]
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "not yet"
    return "\n\n".join([*parts, f"Made {when} by benchmarks/fit_table.py with {'; '.join(made)}."])


def cell(known: dict[str, tuple[str, Plan]], name: str) -> str:
    if name not in known:
        return ""
    found = known[name][1]
    needed, usable = found.memory.needed / GIB, found.memory.usable / GIB
    if not found.fits:
        least = "" if found.memory.complete else "more than "
        return f"no: needs {least}{needed:.1f} GiB of {usable:.1f}"
    bound = found.bound
    assert bound is not None
    speed = f"≥ {1e3 * bound.seconds:.1f} ms"
    if found.job.trains:
        speed += "" if bound.mfu is None else f", MFU ≤ {bound.mfu:.0%}"
    else:
        speed += f" a token, {found.job.batch} rows"
    return f"{needed:.1f} of {usable:.1f} GiB; {speed}; {found.job.mesh}"


if __name__ == "__main__":
    main()
