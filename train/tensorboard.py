"""The same numbers where dashboards show them: TensorBoard, and Weights & Biases."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from mllama_jax.train.config import TrainConfig, flatten
from mllama_jax.train.evaluation import Answer
from mllama_jax.train.metrics import Numbers
from mllama_jax.train.samples import question_text, small_pictures


class Dashboard(Protocol):
    """What `mllama_jax.train.log.Log` tells its numbers."""

    def training(self, step: int, numbers: Numbers) -> None:
        """Numbers of a step, or of the speed until then."""

    def evaluation(self, step: int, numbers: Numbers, samples: Sequence[Answer]) -> None:
        """Numbers and answers of an evaluation."""

    def flush(self) -> None:
        """What was told is on disk, or on its way."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in two folders, which TensorBoard shows as curves of one chart.

    `train` holds training and speed, `held_out` the evaluations. A run that goes on from a
    checkpoint makes TensorBoard forget what it will write again: in `train` the steps behind the
    checkpoint, in `held_out` its evaluation, too.
    """

    def __init__(self, folder: epath.Path, resumed: int):
        """Args: where to; the step that the run goes on from, 0 for a new one."""
        import tensorboardX

        # Readers take a folder's files in the order of their names, which begin with the second.
        suffix = f".{resumed:010}"
        self._train, self._held_out = (
            tensorboardX.SummaryWriter(
                os.fspath(folder / name), purge_step=step, filename_suffix=suffix
            )
            for name, step in (("train", resumed + 1), ("held_out", resumed))
        )

    def training(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._train.add_scalar(name, value, step)

    def evaluation(self, step: int, numbers: Numbers, samples: Sequence[Answer]) -> None:
        for name, value in numbers.items():
            # Under the same name as in training, so that both are in one chart.
            self._held_out.add_scalar("loss" if name == "eval_loss" else name, value, step)
        for number, answer in enumerate(samples, start=1):
            for index, picture in enumerate(small_pictures(answer.record), start=1):
                tag = f"sample {number}/picture {index}"
                self._held_out.add_image(tag, np.asarray(picture), step, dataformats="HWC")
            self._held_out.add_text(f"sample {number}", _as_markdown(answer), step)

    def flush(self) -> None:
        self._train.flush()
        self._held_out.flush()

    def close(self) -> None:
        self._train.close()
        self._held_out.close()


class WeightsAndBiases:
    """A run on its server. Steps that are done again are not sent twice."""

    def __init__(self, config: TrainConfig, resumed: int):
        """Args: the run's settings; the step that it goes on from, 0 for a new one."""
        import wandb

        output = epath.Path(config.output)
        file = output / "wandb_id.txt"
        if not (resumed and file.exists()):
            file.write_text(wandb.util.generate_id())
        self._run: Any = wandb.init(
            project=config.logging.wandb_project,
            id=file.read_text().strip(),
            resume="allow",
            dir=os.fspath(output),
            config=flatten(dataclasses.asdict(config)),
        )

    def training(self, step: int, numbers: Numbers) -> None:
        self._run.log(dict(numbers), step=step)

    def evaluation(self, step: int, numbers: Numbers, samples: Sequence[Answer]) -> None:
        self._run.log(dict(numbers), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def open_dashboards(config: TrainConfig, resumed: int) -> list[Dashboard]:
    """Those that the settings ask for; to be called by one process."""
    found: list[Dashboard] = []
    if config.logging.tensorboard:
        found.append(TensorBoard(epath.Path(config.output) / "tensorboard", resumed))
    if config.logging.wandb_project:
        found.append(WeightsAndBiases(config, resumed))
    return found


def _as_markdown(answer: Answer) -> str:
    """Indented, texts stand as they are."""
    said = {
        "question": question_text(answer.record),
        "answer, right" if answer.is_right else "answer, wrong": answer.text,
        "expected": answer.record.answer,
    }
    return "\n\n".join(
        f"**{name}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines())
        for name, text in said.items()
    )
