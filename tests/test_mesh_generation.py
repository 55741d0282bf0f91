"""Loss, gradients and answers on meshes equal those of one device: eight devices, two processes."""

import itertools
import json
import math
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from processes import Result, results, start
from test_load_onto_mesh import TEXT, VISION
from tiny_model import random_params

import mllama_jax as mj
from mllama_jax.attention import ATTENTION_KINDS
from mllama_jax.cli import main
from mllama_jax.cli.options import Attention
from mllama_jax.distributed import join_processes

SCRIPT = "computing_processes.py"
SMALL_VISION = VISION | {"num_hidden_layers": 2, "num_global_layers": 1}
SMALL_VISION |= {"intermediate_layers_indices": [0], "vision_output_dim": 80}
LAYERS = {
    "scanned": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    "aperiodic": {"num_hidden_layers": 3, "cross_attention_layers": [0, 1]},
}
CASES = [
    # checkpoint, mesh, rows of the batch that is generated
    *[("scanned", mesh, 8) for mesh in ("tensor=8", "data=2,fsdp=2,tensor=2")],
    ("aperiodic", "fsdp=8", 8),
]
TWO_PROCESSES = [
    # Two rows are split over data only: between the processes.
    ("aperiodic", "data=2,fsdp=2,tensor=2", 2),
    ("scanned", "fsdp=4,tensor=2", 8),
]
MODEL = Path(__file__).parents[1] / "examples" / "digits" / "model"
COMMAND = ["generate", "--model", str(MODEL), "--prompt", "3 plus 4?", "--max-new-tokens", "9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, layers in LAYERS.items():
        config = mj.MllamaConfig(SMALL_VISION, {**TEXT, **layers}, image_token_index=64)
        model = mj.MllamaForConditionalGeneration(config)
        model.save_pretrained(random_params(model), folder / name)
    return folder


@pytest.fixture(scope="module")
def started(folder) -> Iterator[dict[str, list[subprocess.Popen]]]:
    """All processes, which run at the same time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [*COMMAND, "--mesh", "fsdp=-1", "--distributed"]
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = {
        "eight devices": [start(SCRIPT, 8, "compute", folder, json.dumps(CASES))],
        "two processes": [
            start(
                *(SCRIPT, 4),
                *("one_of_two", folder, json.dumps(TWO_PROCESSES), json.dumps(command)),
                **job,
                JAX_PROCESS_ID=str(index),
            )
            for index in (0, 1)
        ],
    }
    yield processes
    for process in itertools.chain(*processes.values()):
        process.kill()


@pytest.fixture(scope="module")
def computed(started) -> dict[tuple, dict[str, Any]]:
    ((found, *_),) = results(started["eight devices"])
    return dict(zip(CASES, found, strict=True))


@pytest.fixture(scope="module")
def two_processes(started) -> list[Result]:
    return results(started["two processes"])


def check(case: tuple[str, str, int], found: dict[str, Any]) -> None:
    _, mesh, rows = case
    assert found["errors"]["loss"] < 1e-6
    assert found["errors"]["logits"] < 3e-6
    assert found["errors"]["grads"] < 1e-5
    for here, on_one_device in (found["greedy"], found["sampled"]):
        assert here == on_one_device
    assert len({*itertools.chain(*here)}) > 4
    assert found["misplaced gradients"] == []
    sizes = {axis: int(size) for axis, size in (item.split("=") for item in mesh.split(","))}
    assert found["mesh"] == sizes
    # Two key/value heads are whole on eight devices; two rows are split over data only.
    batch_axes = ("data", "fsdp") if rows == 8 else ("data",)
    parts = math.prod(sizes.get(axis, 1) for axis in batch_axes)
    parts *= 2 if sizes.get("tensor") == 2 else 1
    whole, part = found["cache"]
    assert part * parts == whole


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_eight_devices_compute_what_one_does(case, computed):
    check(case, computed[case])


def test_two_processes_compute_what_one_device_does(two_processes):
    for found, *_ in two_processes:
        for case, facts in zip(TWO_PROCESSES, found["cases"], strict=True):
            check(case, facts)
    first, second = (found["cases"] for found, *_ in two_processes)
    assert [facts["sampled"] for facts in first] == [facts["sampled"] for facts in second]


def test_inputs_that_differ_between_processes_are_refused(two_processes):
    for found, *_ in two_processes:
        assert "options of generate differ between the processes" in found["refusal"]


def test_a_command_of_two_processes_answers_once(two_processes, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mllama-jax", *COMMAND])
    main()
    here = capsys.readouterr()
    assert here.out.strip()
    assert here.err == ""  # nothing was chosen
    first, second = two_processes
    assert first.found["printed"] == here.out
    assert "mesh fsdp=8 over 8 cpu devices: parameters split 8 ways, batch" in first.said
    assert "ways; float32; attention xla" in first.said
    assert second.found["printed"] == ""
    assert "mesh" not in second.said


def test_processes_that_are_described_in_part_are_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match=r"only JAX_NUM_PROCESSES set.* set JAX_COORDINATOR_ADD"):
        join_processes()


def test_commands_offer_every_kind_of_attention():
    assert {*get_args(Attention), "splash_interpret"} == set(ATTENTION_KINDS)
