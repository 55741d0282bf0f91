"""Converts a synthetic checkpoint of a released model's exact shape, side by side with `cp`.

    python benchmarks/convert.py --folder /path/with/room

Writes the checkpoint (bfloat16, Hub layout), then times, in turn and `--repeats` times: `cp` of its
files, its conversion to Orbax, and the conversion of that back to Hugging Face. The files that come
back must be the first ones, byte for byte. Every figure is of a whole process: starting Python and
its imports count. `--layers` takes only the decoder's first layers of the 90B model, which does not
fit a small disk; its largest tensors, and so the memory that a conversion takes, stay the same.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath

from mllama_jax.configs import MllamaConfig, MllamaTextConfig
from mllama_jax.convert.companions import config_json, json_bytes
from mllama_jax.convert.lazy import Region, extent
from mllama_jax.convert.pipeline import write_at_once
from mllama_jax.convert.table import tensors
from mllama_jax.convert.targets.hugging_face import HuggingFaceTarget
from mllama_jax.convert.targets.target import Output, row_blocks

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHARDS = {"11b": 5, "90b": 37}
# Longer than a block, and of no tensor's period: blocks at different places differ.
POOL = np.random.default_rng(0).normal(0, 0.02, 2**24 + 4099).astype(BFLOAT16)


def config_of(model: str, layers: int | None) -> MllamaConfig:
    """The released models' configurations; `layers` keeps only the decoder's first ones."""
    if model == "11b":
        text = {}
    else:
        text = {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_hidden_layers": 100,
            "cross_attention_layers": tuple(range(3, 100, 5)),
        }
    if layers is not None:
        crosses = text.get("cross_attention_layers", MllamaTextConfig().cross_attention_layers)
        text["num_hidden_layers"] = layers
        text["cross_attention_layers"] = tuple(i for i in crosses if i < layers)
    return MllamaConfig(text_config=text)


@dataclass(frozen=True)
class Synthetic:
    """A tensor whose values are a walk through a pool of random numbers."""

    shape: tuple[int, ...]
    offset: int
    dtype: np.dtype = BFLOAT16

    def read(self, region: Region) -> np.ndarray:
        shape = extent(region)
        start = self.offset + (region[0].start * 7919 if region else 0)
        size = int(np.prod(shape, dtype=np.int64))
        return np.take(POOL, np.arange(start, start + size), mode="wrap").reshape(shape)


def write_checkpoint(folder: Path, config: MllamaConfig, num_shards: int) -> int:
    """Writes the checkpoint, unless a whole one lies there; returns its tensors' bytes."""
    outputs = [
        Output(
            tensor.hub,
            tensor.hub,
            Synthetic(tensor.hub_shape, number * 104_729),
            BFLOAT16,
            row_blocks(tensor.hub_shape, BFLOAT16),
        )
        for number, tensor in enumerate(tensors(config, "model"))
    ]
    total = sum(output.num_bytes for output in outputs)
    if not (folder / "config.json").exists():
        target = HuggingFaceTarget(folder, outputs, max_shard_size=-(-total // num_shards) + 2**29)
        config_file = json_bytes(config_json(config, "model", [(BFLOAT16, 1)]))
        write_at_once(target, epath.Path(folder), {"config.json": config_file})
    return total


@dataclass(frozen=True)
class Run:
    """One process: what it took."""

    seconds: float
    peak_bytes: int


def run(*command: str | os.PathLike) -> Run:
    """Runs a command to its end, its peak memory with it."""
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed with {child.returncode}")
    return Run(time.monotonic() - started, usage.ru_maxrss * 1024)


def settle() -> None:
    """The same start for all: nothing left to write, nothing cached, freed memory given back.

    A virtual machine returns freed memory to its host after a while; a process that runs right
    after large files were removed would find its pages ready, and the next one would not.
    """
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    time.sleep(10)


def measure(folder: Path, repeats: int, keep: bool) -> dict[str, list[Run]]:
    """`cp`, to Orbax and back, `repeats` times in turn."""
    source, copy, orbax, back = (folder / name for name in ("hf", "copy", "orbax", "back"))
    python = [sys.executable, "-m", "mllama_jax"]
    runs: dict[str, list[Run]] = {"cp": [], "to Orbax": [], "back": []}
    # What importing the same modules takes, without any tensor.
    runs["nothing"] = [run(*python, "convert", source, orbax, "--dry-run")]
    for _ in range(repeats):
        for path in (copy, orbax, back):
            shutil.rmtree(path, ignore_errors=True)
        settle()
        runs["cp"].append(run("cp", "-r", source, copy))
        shutil.rmtree(copy)
        settle()
        runs["to Orbax"].append(run(*python, "convert", source, orbax, "--to", "orbax"))
        settle()
        runs["back"].append(run(*python, "convert", orbax, back, "--to", "hf"))
    check_same(source, back)
    if not keep:
        for path in (orbax, back):
            shutil.rmtree(path)
    return runs


def check_same(source: Path, back: Path) -> None:
    """The tensors that came back are the first ones, bit for bit."""
    subprocess.run(
        [sys.executable, "-m", "mllama_jax", "verify", source, back],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def report(runs: dict[str, list[Run]], total: int, model: str) -> str:
    baseline = runs.pop("nothing")[0].peak_bytes
    lines = [
        f"{model}: {total / 1e9:.2f} GB of tensors; {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores; importing alone takes {baseline / 2**30:.2f} GiB",
        f"{'':10} {'seconds':>22} {'GB/s':>6} {'of cp':>18} {'peak GiB':>9}",
    ]
    copies = [r.seconds for r in runs["cp"]]
    for name, found in runs.items():
        seconds = [r.seconds for r in found]
        ratios = [cp / own for cp, own in zip(copies, seconds, strict=True)]
        peak = max(r.peak_bytes for r in found) / 2**30
        lines.append(
            f"{name:10} {spread(seconds, '.1f'):>22} "
            f"{total / 1e9 / statistics.median(seconds):6.2f} {spread(ratios, '.2f'):>18} "
            f"{peak:9.2f}"
        )
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Median, and the extremes."""
    low, middle, high = (
        format(v, form) for v in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}–{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="room for three checkpoints")
    parser.add_argument("--model", choices=SHARDS, default="11b")
    parser.add_argument("--layers", type=int, help="only the decoder's first so many layers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    arguments = parser.parse_args()
    config = config_of(arguments.model, arguments.layers)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    total = write_checkpoint(arguments.folder / "hf", config, SHARDS[arguments.model])
    runs = measure(arguments.folder, arguments.repeats, arguments.keep)
    name = arguments.model + (f", {arguments.layers} layers" if arguments.layers else "")
    print(report(dict(runs), total, name))
    seconds = {key: [round(r.seconds, 2) for r in found] for key, found in runs.items()}
    print(json.dumps({"model": name, "bytes": total, "seconds": seconds}))
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
