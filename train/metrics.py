"""What a person watches: a progress line while training, and every step's numbers in a file."""

import json
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import tqdm
from etils import epath

from mllama_jax.cloud import is_cloud

Numbers = Mapping[str, float | int]


class MetricsFile:
    """JSON lines, each with its ``step``: numbers of steps, and behind those of a step the ones of
    an evaluation if there was one."""

    def __init__(self, file: epath.PathLike, resumed_step: int):
        """Drops what a run that goes on from `resumed_step` will write again.

        That is all of later steps, and the evaluation of this one, which comes behind the
        checkpoint; from step 0, everything.
        """
        self._file = epath.Path(file)
        self._new: list[str] = []
        kept: list[str] = []
        if resumed_step and self._file.exists():
            kept = [
                line for line in self._file.read_text().splitlines() if _is_kept(line, resumed_step)
            ]
        self._text = "".join(line + "\n" for line in kept)
        replace_text(self._file, self._text)

    def add(self, step: int, numbers: Numbers) -> None:
        """Adds one line, which `flush` writes."""
        self._new.append(json.dumps({"step": step, **numbers}) + "\n")

    def flush(self) -> None:
        """Lets readers see what was added.

        Nothing can be appended to an object in a bucket, which is written anew as a whole.
        """
        new = "".join(self._new)
        self._new.clear()
        if not is_cloud(self._file):
            with self._file.open("a") as out:
                out.write(new)
        elif new:
            self._text += new
            replace_text(self._file, self._text)


def _is_kept(line: str, resumed_step: int) -> bool:
    try:
        numbers = json.loads(line)
    except ValueError:  # the line that was being written when the run was stopped
        return False
    is_evaluation = any(name.startswith(("eval_", "accuracy/")) for name in numbers)
    return numbers["step"] < resumed_step + (not is_evaluation)


def replace_text(file: epath.Path, text: str) -> None:
    """Writes a file so that, killed at any moment, it holds the earlier text or the new one."""
    replace_bytes(file, text.encode())


def replace_bytes(file: epath.Path, content: bytes) -> None:
    """As `replace_text`."""
    if is_cloud(file):  # an object appears there when all of it has arrived
        file.write_bytes(content)
        return
    unfinished = file.with_name(f".{file.name}.incomplete")
    unfinished.write_bytes(content)
    unfinished.replace(file)


class Progress:
    """A bar on a terminal, plain lines anywhere else.

    Use as a context manager around the steps.
    """

    def __init__(self, first_step: int, last_step: int):
        self._last_step = last_step
        self._bar = (
            tqdm.tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def report(self, step: int, numbers: Numbers, speed: str) -> None:
        """Shows loss, learning rate, gradient norm and labels at `step`, and how fast it went."""
        text = (
            f"loss {numbers['loss']:.4f}  lr {numbers['learning_rate']:.2e}  "
            f"grad {numbers['grad_norm']:.3f}  labels {numbers['labels']:.0f}  {speed}"
        )
        if self._bar is None:
            print(f"step {step}/{self._last_step}  {text}", flush=True)
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Prints something between the progress lines."""
        tqdm.tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
