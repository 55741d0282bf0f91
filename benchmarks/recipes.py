"""Plans every recipe on its slice and keeps what the planner says, in recipes/plans.json.

    python benchmarks/recipes.py               # those that have changed since, or are not there
    python benchmarks/recipes.py --only "11b v5e"

A full-size training step compiles for minutes. Finished plans are kept, one a line, so a run that
was stopped goes on.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from mllama_jax.plan import Plan, plan
from mllama_jax.plan.recipes import job_of
from mllama_jax.plan.record import GIB
from mllama_jax.plan.topology import prepare_environment
from mllama_jax.train.config_file import from_yaml, load_config

FOLDER = Path(__file__).parents[1] / "recipes"
PLANS = FOLDER / "plans.json"
SLICES = {
    "v5e-4": "v5e:2x2",
    "v5e-16": "v5e:4x4",
    "v6e-16": "v6e:4x4",
    "v5p-64": "v5p:2x4x4",
    "h100-1": "h100:1",  # in an environment with mllama-jax[cuda]
}
"""How recipes' names end, and the topology that they are for."""
IMAGES = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="words that a recipe's name must have")
    options = parser.parse_args()
    prepare_environment()
    known = read()
    for file in sorted(FOLDER.glob("*.yaml")):
        if any(word not in file.stem for word in options.only.split()):
            continue
        config = load_config(file)
        if file.stem in known and from_yaml(known[file.stem]["config"]) == config:
            continue
        job = job_of(config, topology_of(file.stem), IMAGES)
        print(file.stem, file=sys.stderr)
        known[file.stem] = line(plan(job, quiet=False))
        print(f"  {known[file.stem]}", file=sys.stderr)
        write(known)


def topology_of(name: str) -> str:
    """Of a recipe."""
    return SLICES[name.rpartition("_")[2]]


def line(found: Plan) -> dict[str, Any]:
    """What is kept of a plan."""
    bound = found.bound
    return {
        "topology": found.job.topology,
        "fits": found.fits,
        "needed_gib": round(found.memory.needed / GIB, 2),
        "usable_gib": round(found.memory.usable / GIB, 2),
        "seconds_at_least": None if bound is None else round(bound.seconds, 3),
        "mfu_at_most": None if bound is None or bound.mfu is None else round(bound.mfu, 3),
        "notes": list(found.notes),
        "date": str(datetime.date.today()),
        "versions": dict(found.versions),
        "config": found.job.config,
    }


def read() -> dict[str, dict[str, Any]]:
    """By recipe."""
    if not PLANS.exists():
        return {}
    lines = map(json.loads, PLANS.read_text().splitlines())
    return {found.pop("recipe"): found for found in lines}


def write(known: dict[str, dict[str, Any]]) -> None:
    text = "".join(json.dumps({"recipe": name, **known[name]}) + "\n" for name in sorted(known))
    unfinished = PLANS.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(PLANS)


if __name__ == "__main__":
    main()
