"""Curves for those who watch from elsewhere: TensorBoard and, if asked for, Weights & Biases."""

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mllama_jax.processing.image_loading import load_image
from mllama_jax.train.data.pictures import readable
from mllama_jax.train.data.records import question_text
from mllama_jax.train.evaluation import Answer
from mllama_jax.train.log_settings import LoggingConfig

_ID_FILE = "wandb_id"
_HELD_OUT = "held_out"


class Curves:
    """Numbers by step, and samples; nothing if nothing was asked for.

    A run that goes on hides what TensorBoard had of later steps, and continues the same run of
    Weights & Biases.
    """

    def __init__(self, folder: epath.Path, config: LoggingConfig, resumed: int, settings: Any):
        """Args: of the run; what was asked for; the step that it goes on from; its settings."""
        self._boards: list[Any] = []
        self._wandb: Any = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            # Of the step that a run goes on from, evaluations come again and other numbers don't;
            # readers drop what is in a folder from a step on.
            board = str(folder / "tensorboard")
            self._boards = [
                SummaryWriter(board, purge_step=resumed + 1),
                SummaryWriter(f"{board}/{_HELD_OUT}", purge_step=resumed),
            ]
        if config.wandb_project:
            import wandb

            file = folder / _ID_FILE
            if not file.exists():
                file.write_text(uuid.uuid4().hex[:8])
            self._wandb = wandb.init(
                project=config.wandb_project,
                id=file.read_text(),
                resume="allow",
                config=settings,
                dir=str(folder),
            )

    def add(self, group: str, step: int, numbers: Mapping[str, float | int]) -> None:
        """Points of the curves ``group/name``."""
        points = {f"{group}/{name}": value for name, value in numbers.items()}
        if self._boards:
            board = self._boards[group == _HELD_OUT]
            for name, value in points.items():
                board.add_scalar(name, value, step)
        if self._wandb is not None:
            finite = {name: value for name, value in points.items() if math.isfinite(value)}
            self._wandb.log(finite, step=step)

    def samples(self, step: int, answers: Sequence[Answer]) -> None:
        """Questions with their pictures, and what the model said."""
        if not self._boards:
            return
        board = self._boards[1]
        for number, answer in enumerate(answers, start=1):
            name = f"samples/{number}"
            board.add_text(name, _as_markdown(answer), step)
            for place, picture in enumerate(answer.record.images, start=1):
                pixels = load_image(readable(picture)).convert("RGB")
                board.add_image(
                    f"{name}/picture_{place}", np.asarray(pixels), step, dataformats="HWC"
                )

    def flush(self) -> None:
        """Lets readers see what was added."""
        for board in self._boards:
            board.flush()

    def close(self) -> None:
        """Ends writing."""
        for board in self._boards:
            board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _as_markdown(answer: Answer) -> str:
    """Everything indented, so that it stands as it is."""
    parts = {
        "question": question_text(answer.record),
        "answer": answer.text,
        "expected": answer.record.answer,
    }
    return "\n\n".join(
        f"**{name}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines())
        for name, text in parts.items()
    )
