"""What the tests of training on meshes run in processes of their own: see `processes.py`."""

import contextlib
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

import mllama_jax as mj
from mllama_jax.sharding import parse_mesh
from mllama_jax.train.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)
from mllama_jax.train.loop import train
from mllama_jax.train.settings import Recipe
from mllama_jax.train.step import start
from mllama_jax.train.stopping import Stopped

LORA: dict[str, Any] = {"trained": TrainedConfig("lora"), "lora": LoraConfig(rank=2)}
LORA_OF_TWO = "lora, two processes"
STEPS_OF_TWO = 60


def config(folder: Path, output: str, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        output=str(folder / output),
        steps=4,
        log_every=1,
        model=ModelConfig(str(folder / "start"), remat="full"),
        trained=TrainedConfig("all"),
        data=DataConfig(train=str(folder / "train.jsonl"), batch_size=8, lengths=(32,)),
        optimizer=OptimizerConfig(learning_rate=1e-2, max_grad_norm=1.0),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    return replace(base, **changes)


def losses(folder: str | Path) -> list[list[float]]:
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [[line["loss"], line["grad_norm"], line["labels"]] for line in lines]


def eight_devices(folder: Path) -> dict[str, Any]:
    """Whole runs on one device and on meshes, and one that changes its mesh on the way."""
    found: dict[str, Any] = {}
    for name, mesh in (("one device", None), ("fsdp=8", "fsdp=8")):
        run = config(folder, name, mesh=mesh)
        train(run)
        found[name] = losses(run.output)

    resumed = config(folder, "fsdp=8", mesh="data=4,fsdp=2")
    checkpoints = Path(resumed.output, "checkpoints")
    newest = max(checkpoints.iterdir(), key=lambda path: int(path.name))
    newest.rename(folder / "newest")
    train(resumed)
    found["resumed on another mesh"] = losses(resumed.output)
    wrong = config(folder, "refused", mesh="fsdp=8")
    try:
        train(replace(wrong, data=replace(wrong.data, batch_size=12)))
    except ConfigError as error:
        found["refused"] = str(error)
    found["bytes"] = state_bytes(folder, "fsdp=8")
    return found


def state_bytes(folder: Path, written: str) -> list[float]:
    """Of parameters and moments: the whole, and the largest part of a device times their number."""
    mesh = parse_mesh(written)
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(folder / "start", mesh=mesh)
    state, _ = start(model, params, Recipe(4, trained=TrainedConfig("all")), 0)
    paths = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    # Eight devices do not divide the 395 tokens that the example's tokenizer knows.
    leaves = [leaf for path, leaf in paths if leaf.ndim and "lm_head" not in str(path)]
    whole = sum(leaf.nbytes for leaf in leaves)
    part = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    assert len(leaves) == 3 * (len(jax.tree.leaves(params)) - 1)
    return [whole, part * mesh.size]


def one_of_two(folder: Path, index: str, port: str) -> dict[str, Any]:
    """Runs on the devices of two processes; at last each is asked for another."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    run = config(folder, "two processes", mesh="fsdp=4")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(run)
        train(config(folder, LORA_OF_TWO, mesh="fsdp=4", **LORA))
    outputs = (run.output, str(folder / LORA_OF_TWO))
    found: dict[str, Any] = {Path(output).name: losses(output) for output in outputs}
    found["printed"] = printed.getvalue()
    for name, changes in {"differ": {"steps": 5 + int(index)}, "no mesh": {"mesh": None}}.items():
        try:
            train(replace(run, **changes))
        except ValueError as error:
            found[name] = str(error)
    return found


def preempted(folder: Path, index: str, port: str, output: str) -> dict[str, Any]:
    """A run on the devices of two processes, and how it was stopped."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    try:
        train(_of_two(folder, output))
    except Stopped as stopped:
        return {"signal": stopped.signal.name, "step": stopped.step, "steps": STEPS_OF_TWO}
    return {}


def undisturbed(folder: Path, index: str, port: str, output: str) -> None:
    """Ends that run, and does another from the beginning."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    train(_of_two(folder, output))
    train(_of_two(folder, str(Path(output).with_name("whole"))))


def _of_two(folder: Path, output: str) -> TrainConfig:
    return config(
        *(folder, output), mesh="fsdp=2", steps=STEPS_OF_TWO, checkpoint=CheckpointConfig(every=25)
    )


if __name__ == "__main__":
    task, folder, *arguments = sys.argv[1:]
    print(json.dumps(globals()[task](Path(folder), *arguments)))
