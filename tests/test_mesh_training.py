"""Training on meshes equals training on one device: eight devices, two processes."""

import shutil
import socket
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from processes import results, start
from tiny_run import write_records, write_start
from training_processes import LORA, LORA_OF_TWO, config, losses

import mllama_jax as mj
from mllama_jax.convert import CheckpointError, convert
from mllama_jax.train.loop import train

SCRIPT = "training_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    write_start(path / "start")
    write_records(path / "train.jsonl", text_only=False)
    return path


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        start(SCRIPT, 8, "eight_devices", folder),
        *(start(SCRIPT, 2, "one_of_two", folder, index, port) for index in range(2)),
    ]
    alone = config(folder, "lora, one device", **LORA)
    train(alone)
    eight, first, _ = (result.found for result in results(processes))
    return {"lora, one device": losses(alone.output)} | eight | first


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("fsdp=8", "one device"),
        ("resumed on another mesh", "one device"),
        ("two processes", "one device"),
        ("lora, two processes", "lora, one device"),
    ],
)
def test_losses_and_gradient_norms(found: dict[str, Any], run: str, expected: str):
    assert len(found[run]) == 4
    np.testing.assert_allclose(found[run], found[expected], rtol=2e-4)


def test_adapters_alone_train_something_else(found: dict[str, Any]):
    assert found["lora, one device"][0][0] == pytest.approx(found["one device"][0][0], rel=1e-6)
    assert found["lora, one device"][3][0] != pytest.approx(found["one device"][3][0], rel=1e-3)
    assert found["lora, one device"][3][0] < found["lora, one device"][0][0]


def test_a_job_of_two_processes_is_gone_on_with_by_one(
    folder: Path, found: dict[str, Any], capfd: pytest.CaptureFixture
):
    """On one device, which ends it with the merged model."""
    assert f"convert {folder}/two processes FOLDER` makes a model folder" in found["printed"]
    assert "Started again in one process, on a mesh of its own" in found["printed"]
    run = config(folder, LORA_OF_TWO, **LORA)
    with pytest.raises(CheckpointError, match="checkpoints hold only what it trains"):
        convert(run.output, folder / "converted")
    shutil.rmtree(Path(run.output, "checkpoints", "4"))
    train(run)
    assert "Going on from step 2 of 4." in capfd.readouterr().out
    np.testing.assert_allclose(losses(run.output), found["lora, one device"], rtol=2e-4)
    ours, expected = (
        mj.MllamaForConditionalGeneration.from_pretrained(folder / name / "model")[1]
        for name in (LORA_OF_TWO, "lora, one device")
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)  # steps of up to 1e-2


def test_processes_that_are_asked_for_different_runs_refuse(found: dict[str, Any]):
    assert "the configuration or the data of this run differ between the" in found["differ"]


def test_processes_without_a_mesh_refuse(found: dict[str, Any]):
    assert (
        "of 2 processes: expected a mesh of all 4 devices, such as mesh=fsdp=4" in found["no mesh"]
    )


def test_state_is_split(found: dict[str, Any]):
    """All but norms, gates and biases: little is held more than once."""
    whole, held = found["bytes"]
    assert whole <= held < 1.2 * whole


def test_batches_that_the_mesh_does_not_divide_are_refused(found: dict[str, Any]):
    assert found["refused"] == (
        "data.batch_size=12 can't be split over the mesh fsdp=8, whose axes data and fsdp make 8 "
        "groups: expected a multiple of 8"
    )
