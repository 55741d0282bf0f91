"""Whatever happens to a run or to its checkpoints, it ends bit for bit as if nothing had."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from processes import cpu_devices
from tiny_run import assert_same_end, kept, metrics, write_records, write_start

import mllama_jax as mj
from mllama_jax.train.checkpoints import open_checkpoints
from mllama_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)
from mllama_jax.train.config_file import to_yaml
from mllama_jax.train.damage import is_damage
from mllama_jax.train.job import open_job
from mllama_jax.train.loop import train

STEPS = 60

# Orbax reads arrays side by side, and of several that can't be read it tells only one.
not_all_retrieved = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("survival")
    write_start(path / "start")
    write_records(path / "train.jsonl", text_only=False)
    return path


@pytest.fixture(scope="module")
def config(folder):
    data = str(folder / "train.jsonl")
    return TrainConfig(
        output=str(folder / "whole"),
        steps=STEPS,
        log_every=1,
        model=ModelConfig(str(folder / "start")),
        trained=TrainedConfig("all"),
        data=DataConfig(train=data, batch_size=2, lengths=(32,)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=3),
        checkpoint=CheckpointConfig(every=5, keep=3),
    )


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run that nothing stopped."""
    train(config)
    return Path(config.output)


class Run:
    """A run of the command in a process of its own, that something happens to."""

    def __init__(self, config: TrainConfig, folder: Path):
        """Args: the run; where its settings, what it prints and compiled programs are kept."""
        self._checkpoints = Path(config.output) / "checkpoints"
        self._printed = folder / "printed.txt"
        file = folder / "train.yaml"
        file.write_text(to_yaml(config))
        environment = {
            **os.environ,
            **cpu_devices(1),
            **kept(folder),
        }
        with self._printed.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mllama_jax", "train", str(file)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def stopped(self, number: signal.Signals, *, steps: int, saving: bool = False) -> str:
        """Sends a signal after so many of its steps; returns what it has printed.

        With `saving` it waits for a checkpoint that is just being written.
        """
        try:
            self._wait(lambda: self._printed.read_text().count("\nstep ") >= steps)
            if saving:
                self._wait(lambda: any(self._checkpoints.glob("*tmp*")))
            self._process.send_signal(number)
            status = self._process.wait(120)
        finally:
            self._process.kill()
        assert status == (-number if number == signal.SIGKILL else 128 + number)
        return self._printed.read_text()

    def _wait(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not happened():
            assert self._process.poll() is None, "the run ended before it could be stopped"
            assert time.monotonic() < end, "nothing happened in time"
            time.sleep(0.001)


def test_a_run_that_is_stopped_again_and_again_ends_as_the_whole_one(config, whole, tmp_path):
    output = tmp_path / "stopped"
    run = replace(config, output=str(output))
    dice = random.Random(0)

    Run(run, tmp_path).stopped(signal.SIGKILL, steps=7, saving=True)
    said = Run(run, tmp_path).stopped(signal.SIGTERM, steps=dice.randrange(2, 12), saving=True)
    step = stopped_step(said, "SIGTERM")
    assert metrics(output)[-1]["step"] == step
    said = Run(run, tmp_path).stopped(signal.SIGKILL, steps=dice.randrange(1, 9))
    assert f"Going on from step {step} of {STEPS}." in said
    said = Run(run, tmp_path).stopped(signal.SIGINT, steps=dice.randrange(1, 12))
    assert (output / "checkpoints" / str(stopped_step(said, "SIGINT"))).exists()
    assert not (output / "model").exists()

    train(run)
    assert_same_end(output, whole)


def stopped_step(said: str, name: str) -> int:
    found = re.search(rf"stopped by {name} after step (\d+); the same command goes on", said)
    assert found, said
    return int(found[1])


def test_sigterm_in_the_middle_of_an_evaluation_saves_and_asks_again(config, folder, tmp_path):
    """The questions of an evaluation that was cut off are asked when the run goes on."""
    long = replace(
        config,
        steps=4,
        output=str(tmp_path / "whole"),
        data=replace(config.data, held_out=config.data.train),
        evaluation=EvaluationConfig(every=3, batch_size=2, max_new_tokens=30),
    )
    train(long)
    output = tmp_path / "stopped"
    run = replace(long, output=str(output))
    said = Run(run, tmp_path).stopped(signal.SIGTERM, steps=3)
    assert stopped_step(said, "SIGTERM") == 3
    assert "accuracy/all" not in metrics(output)[-1]
    train(run)
    assert_same_end(output, tmp_path / "whole")


@pytest.fixture
def damaged(config, whole, tmp_path):
    """A copy of the whole run, without its end; its checkpoints may be damaged."""
    output = tmp_path / "damaged"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    return replace(config, output=str(output)), output


def largest_file(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=os.path.getsize)


def truncate(checkpoint: Path) -> None:
    file = largest_file(checkpoint)
    os.truncate(file, file.stat().st_size // 2)


def change_a_bit(checkpoint: Path) -> None:
    file = largest_file(checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    largest_file(checkpoint).unlink()


def empty(checkpoint: Path) -> None:
    for file in checkpoint.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


@not_all_retrieved
@pytest.mark.parametrize("damage", [truncate, change_a_bit, lose_a_file, empty])
def test_the_checkpoint_before_a_damaged_one_is_used(damaged, whole, capfd, damage):
    run, output = damaged
    damage(output / "checkpoints" / str(STEPS))
    train(run)
    printed = capfd.readouterr().out
    target = output / "damaged_checkpoints" / str(STEPS)
    assert f"The checkpoint of step {STEPS} is damaged" in printed
    assert f"it was moved to {target}." in printed
    assert target.exists()
    assert f"Going on from step {STEPS - 5} of {STEPS}." in printed
    assert_same_end(output, whole)


@not_all_retrieved
def test_a_run_whose_checkpoints_are_all_damaged_begins_anew_only_when_told_to(damaged, whole):
    run, output = damaged
    for checkpoint in (output / "checkpoints").iterdir():
        truncate(checkpoint)
    aside, written = output / "damaged_checkpoints", metrics(output)
    for _ in range(2):  # a job that is started again and again by a scheduler is no decision
        with pytest.raises(ValueError, match=f"only damaged ones, in {aside}.*or remove {aside}"):
            train(run)
        assert metrics(output) == written
    shutil.rmtree(aside)
    train(run)
    assert_same_end(output, whole)


TROUBLE = [
    ConnectionError("no route to host"),
    PermissionError("not yours"),
    MemoryError(),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    # TensorStore has one type for all; nine of ten statuses say nothing about the files.
    ValueError('UNAVAILABLE: Error reading "gs://b/o": CURL error: could not connect'),
    ValueError('PERMISSION_DENIED: Error reading "gs://b/o": HTTP response code: 403'),
    ValueError('DEADLINE_EXCEEDED: Error reading "gs://b/o"'),
]


@pytest.mark.parametrize("error", TROUBLE, ids=repr)
def test_trouble_that_is_not_in_the_files_is_not_taken_for_damage(error):
    wrapped = KeyError("as Orbax does, whatever happened")
    wrapped.__cause__ = error
    assert not is_damage(error)
    assert not is_damage(wrapped)
    assert is_damage(FileNotFoundError())
    assert is_damage(ValueError("DATA_LOSS: Error decoding manifest"))


def test_trouble_leaves_every_checkpoint_where_it_is(damaged, monkeypatch):
    run, output = damaged
    content = sorted((output / "checkpoints").iterdir())

    def load(*_: object) -> None:
        raise KeyError("as Orbax does, whatever happened") from TROUBLE[0]

    monkeypatch.setattr(ocp.training.Checkpointer, "load_checkpointables", load)
    with pytest.raises(OSError, match=f"{STEPS}: can't be read now.*ConnectionError: no route"):
        train(run)
    assert sorted((output / "checkpoints").iterdir()) == content
    assert not (output / "damaged_checkpoints").exists()


def test_there_is_never_a_second_state_on_the_devices(config, whole, monkeypatch):
    job, state = open_job(config)
    load = ocp.training.Checkpointer.load_checkpointables

    def loaded(*arguments: Any) -> Any:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        return load(*arguments)

    monkeypatch.setattr(ocp.training.Checkpointer, "load_checkpointables", loaded)
    with open_checkpoints(whole / "checkpoints", config.checkpoint, job.origin()) as checkpoints:
        found = checkpoints.restore(state, job.batches(), pytest.fail)
    assert int(found.step) == STEPS


def test_other_data_is_refused_and_moved_data_is_not(config, folder, whole, tmp_path):
    output, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole, output)
    moved.mkdir()
    for file in (*folder.glob("*.png"), folder / "train.jsonl"):
        shutil.copy(file, moved)
    file = moved / "train.jsonl"
    run = replace(config, output=str(output), data=replace(config.data, train=str(file)))
    train(run)
    assert_same_end(output, whole)
    lines = file.read_text().splitlines(keepends=True)
    shuffled, fewer = [lines[1], lines[0], *lines[2:]], lines[1:]
    for changed in (shuffled, fewer):
        file.write_text("".join(changed))
        counts = f"24 conversations then, {len(changed)} now"
        with pytest.raises(ValueError, match=rf"{STEPS}: .* data has changed \({counts}\)"):
            train(run)


def test_other_weights_under_the_trained_ones_are_refused(config, folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "start", base)
    run = replace(
        config,
        output=str(tmp_path / "run"),
        steps=4,
        model=ModelConfig(str(base)),
        trained=TrainedConfig("cross_attention"),
    )
    train(run)
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(base)
    norm = params["language_model"]["model"]["norm"]
    norm["scale"] = norm["scale"].at[3].multiply(1.25)
    model.save_pretrained(params, base)
    with pytest.raises(ValueError, match="the parameters that are not trained have changed"):
        train(run)


@not_all_retrieved
def test_a_changed_bit_is_found_or_changes_nothing(config, whole, tmp_path):
    """In every file of a checkpoint, data and descriptions."""
    dice = random.Random(1)
    job, state = open_job(config)

    def restored(folder: Path) -> list[np.ndarray] | None:
        with open_checkpoints(folder, config.checkpoint, job.origin()) as checkpoints:
            batches, said = job.batches(), []
            try:
                found = checkpoints.restore(state, batches, said.append)
            except ValueError:
                assert "is damaged" in said[0]
                return None
            arrays = jax.device_get(jax.tree.leaves((found.params, found.opt_state, found.step)))
            return [*arrays, np.array(repr(batches.get_state()))]

    expected = restored(whole / "checkpoints")
    assert expected
    source = whole / "checkpoints" / str(STEPS)
    files = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    found = 0
    for number, name in enumerate(files):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(source, folder / str(STEPS))
        content = bytearray((source / name).read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (folder / str(STEPS) / name).write_bytes(content)
        arrays = restored(folder)
        found += arrays is None
        if arrays is not None:
            assert all(map(np.array_equal, arrays, expected)), name
    assert 5 < found < len(files)


def test_a_packed_run_of_adapters_that_is_killed_ends_as_the_whole_one(config, tmp_path):
    run = replace(
        config,
        output=str(tmp_path / "whole"),
        steps=16,
        trained=TrainedConfig("lora"),
        lora=LoraConfig(rank=2),
        data=replace(config.data, packing=True, lengths=(48,), max_images=3),
        checkpoint=CheckpointConfig(every=3),
    )
    train(run)
    killed = replace(run, output=str(tmp_path / "killed"))
    Run(killed, tmp_path).stopped(signal.SIGKILL, steps=7)
    train(killed)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    adapter = Path("adapter") / "adapter_model.safetensors"
    found, expected = (tmp_path / name / adapter for name in ("killed", "whole"))
    assert found.read_bytes() == expected.read_bytes()
