"""What all comparisons share: sides in processes of their own, their turns, and the report.

A script has one function for each side and task; `serve` answers with them in a process that
`Side` starts. Sides take turns (A B A B …), warmed up before, so that a machine that gets slower or
faster does so for all of them, and what is reported is the median of the ratios of such pairs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = (
    "mllama-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "torch",
    "torchvision",
    "transformers",
    "pillow",
)
CLOCK = "BENCHMARK_CLOCK"
clock = time.process_time if os.environ.get(CLOCK) == "cpu" else time.perf_counter
"""Of all measurements; processor time for machines that others use too (`--cpu-time`)."""
Task = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """A task done once, by one side.

    Attributes:
        seconds: of the task, by `clock`.
        peak_bytes: most memory of its process during the task.
        values: what the task returned.
    """

    seconds: float
    peak_bytes: int
    values: dict[str, Any]


class Side:
    """A process that does tasks when it is asked, and waits otherwise.

    Args:
        script: calls `serve` when it is started with ``--serve NAME``.
        name: of the side, for `serve`.
        cores: so many processors are used.
        python: the interpreter, with the packages of its environment; this one's if not given.
        settings: given to each task.
    """

    def __init__(
        self, script: str, name: str, *, cores: int, python: str | None = None, **settings: Any
    ):
        self.name = name
        self._settings = settings
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cores))
        limits["JAX_PLATFORMS"] = "cpu"
        self._process = subprocess.Popen(
            [python or sys.executable, script, "--serve", name, "--cores", str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **limits},
            text=True,
        )

    def ask(self, task: str, **arguments: Any) -> Result:
        """Does a task; arguments and what it returns travel as JSON."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"task": task, "arguments": {**self._settings, **arguments}})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} ended with {self._process.wait()} during {task!r}")
        return Result(**json.loads(answer))

    def versions(self) -> str:
        """Of Python and of the packages that are compared, in its environment."""
        return ", ".join(f"{name} {number}" for name, number in self.ask("versions").values.items())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def serve(tasks: Mapping[str, Task], cores: int) -> None:
    """Answers `Side.ask` until there are no more questions."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    tasks = {"versions": lambda **_: versions(), **tasks}
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        started = clock()
        values = tasks[question["task"]](**question["arguments"])
        result = Result(clock() - started, _peak_bytes(), values)
        answers.write(json.dumps(asdict(result)) + "\n")
        answers.flush()


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def in_turns(
    sides: Sequence[Side], task: str, repeats: int, **arguments: Any
) -> dict[str, list[Result]]:
    """The task by each side in turn, ``repeats`` times."""
    results: dict[str, list[Result]] = {side.name: [] for side in sides}
    for number in range(repeats):
        for side in sides:
            result = side.ask(task, **arguments)
            results[side.name].append(result)
            print(f"{task} {number + 1}/{repeats} {side.name}: {result.seconds:.2f} s", flush=True)
    return results


@dataclass(frozen=True)
class Spread:
    """Median and extremes of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        form = ".2f" if self.median < 100 else ",.0f"
        return f"{self.median:{form}} ({self.low:{form}}–{self.high:{form}})"


@dataclass(frozen=True)
class Row:
    """A line of the table: a rate of ours beside the peer's; larger is better.

    Attributes:
        limit: what the machine would allow, in the same unit.
        aim: for the ratio to the peer, or to the limit where there is no peer.
    """

    subject: str
    unit: str
    ours: Spread
    peer: Spread | None = None
    ratio: Spread | None = None
    limit: Spread | None = None
    of_limit: Spread | None = None
    aim: float | None = None


def against_peer(
    subject: str, unit: str, ours: Sequence[float], peer: Sequence[float], aim: float
) -> Row:
    """Rates of runs that took turns."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return Row(subject, unit, *map(Spread.of, (ours, peer, ratios)), aim=aim)


def against_limit(
    subject: str, unit: str, ours: Sequence[float], limit: Sequence[float], aim: float
) -> Row:
    """Rates of runs, and the limit that was measured beside each."""
    shares = [a / b for a, b in zip(ours, limit, strict=True)]
    spreads = {"limit": Spread.of(limit), "of_limit": Spread.of(shares)}
    return Row(subject, unit, Spread.of(ours), **spreads, aim=aim)


@dataclass
class Report:
    """All that a script has measured.

    Attributes:
        title: what was compared.
        exact: both sides must compute the same.
        rows: the table.
        notes: lines below it.
        details: anything else worth keeping, for the JSON file.
    """

    title: str
    exact: bool = True
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def compare(
        self, what: str, ours: Any, peer: Any, bound: float, relative: bool = False
    ) -> None:
        """Holds results of both sides against each other; notes the difference if it may be large.

        Args:
            bound: for the largest difference, of the largest magnitude if ``relative``.
        """
        error = float(np.abs(np.asarray(ours) - np.asarray(peer)).max())
        error /= float(np.abs(peer).max()) if relative else 1
        assert error <= bound or not self.exact, (what, error, bound)
        if error > bound:
            self.notes.append(f"{what}: results differ by up to {error:.1e}")

    def write(self, output: Path, cores: int) -> None:
        """Writes ``output`` with the endings .json and .md, and prints the table."""
        facts = {"machine": machine(), "cores used": cores, "versions": versions()}
        facts["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        facts["command"] = " ".join([Path(sys.executable).name, *sys.argv])
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {**asdict(self), **facts}
        output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        text = self._markdown(facts)
        output.with_suffix(".md").write_text(text)
        print(text)

    def _markdown(self, facts: Mapping[str, Any]) -> str:
        lines = [
            f"# {self.title}",
            "",
            "| subject | unit | ours | peer | ratio | limit | of limit | aim |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = (row.ours, row.peer, row.ratio, row.limit, row.of_limit, row.aim)
            filled = ("" if cell is None else str(cell) for cell in cells)
            lines.append(f"| {row.subject} | {row.unit} | {' | '.join(filled)} |")
        lines += ["", "Median (lowest–highest) of runs in turn.", ""]
        lines += [f"- {note}" for note in self.notes]
        where = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
        packages = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        kind = "processor time" if os.environ.get(CLOCK) == "cpu" else "wall time"
        lines += [f"- {where}; {facts['cores used']} used, {kind}", f"- {packages}"]
        lines += [f"- {facts['time']}: `{facts['command']}`", ""]
        return "\n".join(lines)


def machine() -> dict[str, str]:
    """Processor, its number, memory."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that are compared."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def gibibytes(results: Sequence[Result]) -> str:
    """Peak memory of some runs."""
    return f"{max(result.peak_bytes for result in results) / 2**30:.2f} GiB"


def arguments_of(options: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says; sides get the clock through the environment."""
    arguments = options.parse_args()
    if arguments.cpu_time:
        arguments.cores = 1
        os.environ[CLOCK] = "cpu"
    return arguments


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="a small part, to see that it works")
    options.add_argument("--repeats", type=int, default=3, help="turns of each side")
    options.add_argument("--cores", type=int, default=2)
    output = Path("runs/benchmarks") / name
    options.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure processor time, on one core: for a machine that others use too",
    )
    options.add_argument("--output", type=Path, default=output, help=".json and .md are added")
    options.add_argument("--serve", help=argparse.SUPPRESS)
    return options


def add_peer_python(options: argparse.ArgumentParser) -> None:
    """The option of scripts that can take the peer from another environment."""
    options.add_argument(
        "--peer-python",
        help="interpreter of an environment with this package and another version of transformers "
        "to compare with; results may differ then, by how much is reported",
    )
