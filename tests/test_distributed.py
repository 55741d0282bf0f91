"""Whether a process is one of several."""

import os
import subprocess
import sys

import pytest

from mllama_jax.distributed import job_around


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        ({"JAX_NUM_PROCESSES": "4"}, "the environment"),
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16"}, "Slurm"),
        # A batch script, or a shell of salloc, has 16 tasks to give away and is one.
        ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "16"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_what_started_a_process_is_told_by_its_environment(environment, found):
    assert job_around(environment) == found


def test_a_tpu_is_one_of_several_unless_it_is_not_to_be_used(monkeypatch, tmp_path):
    device = tmp_path / "accel0"
    monkeypatch.setattr("mllama_jax.distributed._TPU_DEVICES", (str(device),))
    assert job_around({}) is None
    device.touch()
    assert job_around({}) == "Cloud TPU"  # libtpu is installed for tests
    assert job_around({"JAX_PLATFORMS": "tpu,cpu"}) == "Cloud TPU"
    assert job_around({"JAX_PLATFORMS": "cpu"}) is None


JOIN = """
import sys
from mllama_jax.distributed import join_if_any
join_if_any()
import jax
print(jax.process_count(), jax.device_count(), file=sys.stderr)
"""


def test_processes_that_open_mpi_starts_find_each_other():
    """As mpirun starts them; it tells each of them where the first one is."""
    number = os.getpid() % 4096  # of the job, from which JAX takes a port
    common = {
        "OMPI_MCA_orte_hnp_uri": f"{number << 12}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env={
                **os.environ,
                **common,
                "OMPI_COMM_WORLD_RANK": rank,
                "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    (first, said), (second, also_said) = (process.communicate(timeout=120) for process in started)
    assert first == "Process 0 of 2 (Open MPI says so), with 1 of 2 devices\n"
    assert second == ""
    for text in (said, also_said):
        assert text.splitlines()[-1] == "2 2"
