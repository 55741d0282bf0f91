"""Runs scripts of this folder in processes of their own: jax fixes the devices when it starts."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""XLA's flags with which programs for the CPU are compiled in half the time."""


class Result(NamedTuple):
    """Attributes:
    found: the last line of the standard output, JSON.
    said: the standard error.
    """

    found: Any
    said: str


def start(script: str, devices: int, *arguments: Any, **environment: str) -> subprocess.Popen:
    """Starts a script with so many CPU devices."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name(script), *map(str, arguments)],
        env={**os.environ, **cpu_devices(devices), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def cpu_devices(number: int) -> dict[str, str]:
    """The environment of a process that has so many."""
    return {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={number}"}


def results(processes: Sequence[subprocess.Popen]) -> list[Result]:
    """What each process found; ends all of them when one fails, which the others would wait for."""
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(_result, process) for process in processes]
        done, _ = wait(found, return_when=FIRST_EXCEPTION)
        for process in processes:
            process.kill()
        return [future.result() for future in (found if len(done) == len(found) else done)]


def memory(field: str) -> int:
    """Bytes that the system counts for this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _result(process: subprocess.Popen) -> Result:
    with process:
        out, errors = process.communicate(timeout=480)
    assert process.returncode == 0, errors
    return Result(json.loads(out.splitlines()[-1]), errors)
