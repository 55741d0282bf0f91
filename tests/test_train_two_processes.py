"""A job of two processes that is stopped and killed ends bit for bit as one that was not."""

import signal
import socket
import time
from pathlib import Path

import pytest
from processes import results, start
from tiny_run import kept, metrics, write_records, write_start

from mllama_jax.convert import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("two")
    write_start(path / "start")
    write_records(path / "train.jsonl", text_only=False)
    return path


class Two:
    """A run of two processes, that something happens to."""

    def __init__(self, name: str, folder: Path, output: Path):
        """Args: what of training_processes.py they run; where model and data are; the run's."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self._output = output
        self.processes = [
            start("training_processes.py", 1, name, folder, index, port, output, **kept(folder))
            for index in range(2)
        ]

    def reached(self, steps: int) -> None:
        """Returns when so many steps are in the run's metrics."""
        end = time.monotonic() + 120
        file = self._output / "metrics.jsonl"
        while not file.exists() or file.read_text().count("\n") < steps:
            assert time.monotonic() < end
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.01)

    def killed(self) -> None:
        """Kills the second one, and soon after, as a scheduler does, the first."""
        self.processes[1].kill()
        time.sleep(0.3)
        self.processes[0].kill()
        for process in self.processes:
            process.communicate()


def test_two_processes_are_stopped_and_killed_and_end_as_if_nothing_had_happened(folder, tmp_path):
    """SIGTERM to one saves the same step in both; kill -9 costs what came after a checkpoint."""
    output = tmp_path / "stopped"
    run = Two("preempted", folder, output)
    run.reached(3)
    run.processes[1].send_signal(signal.SIGTERM)
    first, second = (result.found for result in results(run.processes))
    assert first == second
    assert first["signal"] == "SIGTERM"
    step = first["step"]
    assert metrics(output)[-1]["step"] == step < first["steps"]
    assert (output / "checkpoints" / str(step)).exists()

    run = Two("preempted", folder, output)
    run.reached(step + 3)
    run.killed()
    run = Two("undisturbed", folder, output)  # goes on, and then does it all without a break
    results(run.processes)
    assert metrics(output) == metrics(tmp_path / "whole")
    assert verify(output / "checkpoints", tmp_path / "whole" / "checkpoints").equal
