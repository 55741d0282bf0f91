"""Plans on disk: what was compiled once is not compiled again.

A plan is found again only if everything is the same that its figures depend on: the job, the
model's configuration, the versions of the compiler and the libraries, and this package's source.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path

import mllama_jax.train
from mllama_jax.configs import MllamaConfig
from mllama_jax.plan.job import Job
from mllama_jax.plan.record import Plan

_LIBRARIES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax")


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/mllama_jax/plans``, by default below ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mllama_jax" / "plans"


def load(folder: Path, key: str) -> Plan | None:
    """The plan of a key; None if there is none, or none that can be read."""
    try:
        return Plan.from_json(json.loads((folder / f"{key}.json").read_text()))
    except (FileNotFoundError, ValueError):
        return None


def save(folder: Path, key: str, plan: Plan) -> None:
    """Writes a plan; one that is there is replaced, and never seen half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{key}.{os.getpid()}.part"
    unfinished.write_text(json.dumps(plan.to_json(), indent=1, sort_keys=True) + "\n")
    unfinished.replace(folder / f"{key}.json")


def key_of(job: Job, config: MllamaConfig) -> str:
    """Of a job in which nothing is left to defaults."""
    parts = {
        # Where the configuration came from does not matter.
        "job": {**asdict(job), "model": config.to_dict()},
        "versions": versions(),
        "source": source_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def versions() -> Mapping[str, str]:
    """Of the libraries that decide what is compiled; those that are installed."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def source_hash() -> str:
    """Of all of the package's modules but those that convert checkpoints."""
    digest = hashlib.sha256()
    for package in (mllama_jax, mllama_jax.train):
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
