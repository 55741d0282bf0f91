"""What a person watches of a run, beside its progress line: the section ``logging``."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class LoggingConfig:
    """What is written beside metrics.jsonl and speed.jsonl, which always are."""

    tensorboard: bool = False
    """Curves and samples for TensorBoard, in the folder tensorboard of the output."""
    wandb_project: str | None = None
    """Curves for Weights & Biases, in the project of this name; null for none."""
    samples: int = 0
    """Held-out questions that are shown with their pictures and the model's answers, on a page
    for each evaluation in the folder samples."""
    profile_steps: tuple[int, ...] = ()
    """First and last step of a profiler's trace, in the folder profile; [] for none."""


def logging_problems(config: LoggingConfig) -> Iterator[str]:
    """What is wrong with the settings, each a line with its key."""
    if config.samples < 0:
        yield f"logging.samples={config.samples!r}: expected 0 or more"
    if config.wandb_project is not None and not config.wandb_project:
        yield "logging.wandb_project='': expected a name, or null"
    steps = config.profile_steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        yield (
            f"logging.profile_steps={list(steps)!r}: expected the first and the last step, such as "
            "[10, 12], or [] for none"
        )


def check_installed(config: LoggingConfig) -> None:
    """Raises ValueError, before any training, if a package that was asked for is not there."""
    missing = []
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        missing.append(
            "logging.tensorboard=true needs tensorboardX: pip install 'mllama-jax[watch]'"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        missing.append(
            f"logging.wandb_project={config.wandb_project!r} needs Weights & Biases: "
            "pip install wandb"
        )
    if missing:
        raise ValueError("\n".join(missing))
