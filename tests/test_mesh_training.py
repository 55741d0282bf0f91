"""Training on meshes equals training on one device: eight devices, two processes."""

import socket
from typing import Any

import numpy as np
import pytest
from processes import results, start
from tiny_run import write_records, write_start

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
    eight, first, _ = (result.found for result in results(processes))
    return eight | {"two processes": first}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("fsdp=8", "one device"),
        ("resumed on another mesh", "one device"),
        ("two processes", "one device"),
        ("lora, fsdp=8", "lora, one device"),
    ],
)
def test_losses_and_gradient_norms(found: dict[str, Any], run: str, expected: str):
    assert len(found[run]) == 4
    np.testing.assert_allclose(found[run], found[expected], rtol=2e-4)


def test_adapters_alone_train_something_else(found: dict[str, Any]):
    assert found["lora, one device"][0][0] == pytest.approx(found["one device"][0][0], rel=1e-6)
    assert found["lora, one device"][3][0] != pytest.approx(found["one device"][3][0], rel=1e-3)
    assert found["lora, one device"][3][0] < found["lora, one device"][0][0]


def test_state_is_split(found: dict[str, Any]):
    """All but norms, gates and biases: little is held more than once."""
    whole, held = found["bytes"]
    assert whole <= held < 1.2 * whole


def test_batches_that_the_mesh_does_not_divide_are_refused(found: dict[str, Any]):
    assert found["refused"] == (
        "data.batch_size=12 can't be split over the mesh fsdp=8, whose axes data and fsdp make 8 "
        "groups: expected a multiple of 8"
    )
