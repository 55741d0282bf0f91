"""A training run from beginning to end; it reads from top to bottom."""

import math
from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
from etils import epath

from mllama_jax.attention import AttentionKind
from mllama_jax.distributed import check_same_in_all_processes
from mllama_jax.execution import RematPolicy
from mllama_jax.generation.config import GenerationConfig
from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.pretrained import Params
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.sharding import describe, num_parts, place
from mllama_jax.train.checkpoints import open_checkpoints
from mllama_jax.train.config import ConfigError, TrainConfig, differences, to_yaml
from mllama_jax.train.data import make_dataset
from mllama_jax.train.evaluation import Score, answer_records, scores, table
from mllama_jax.train.lora import adapters_of, init_adapters, merged
from mllama_jax.train.metrics import MetricsFile, Numbers, Progress, replace_text
from mllama_jax.train.records import Record, read_records
from mllama_jax.train.step import (
    Metrics,
    init_state,
    make_optimizer,
    train_step,
)


def train(config: TrainConfig) -> list[Score]:
    """Trains, or goes on from the newest checkpoint in ``config.output``; writes a model folder.

    ``config.output`` gets config.yaml, metrics.jsonl, checkpoints/ and, at the end, model/: a
    Hugging Face folder with weights, configuration, tokenizer, chat template, image processor
    settings and generation settings. All of these but the weights also lie in ``config.output``
    itself from the start: what reads or converts a checkpoint finds them there. The same
    configuration gives the same model, however often the run was stopped and started again.

    Returns:
        The scores on the held-out questions, empty if there are none.

    Raises:
        FileNotFoundError, ValueError: model, data or settings can't be used, or differ between
            the processes of a job.
        FloatingPointError: the loss or the gradients are no finite numbers any more.
    """
    output = epath.Path(config.output)
    records = read_records(config.data.train)
    held_out = read_records(config.data.held_out) if config.data.held_out else []
    processor = MllamaProcessor.from_pretrained(config.model.path)
    model, params = MllamaForConditionalGeneration.from_pretrained(
        config.model.path,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        mesh=config.mesh,
        # TrainConfig checks both.
        attention=cast(AttentionKind, config.model.attention),
        remat=cast(RematPolicy, config.model.remat),
    )
    model = model.clone(images_at_once=config.model.images_at_once)
    _check_batch(config, model)
    check_same_in_all_processes(
        "the configuration or the data of this run",
        [to_yaml(config), *records, *held_out],
        model.mesh,
    )

    lora = config.lora if config.lora.rank else None
    optimizer = make_optimizer(config.optimizer, config.steps)
    frozen = None
    if lora is None:
        state = init_state(params, optimizer, config.seed, model.mesh)
    else:
        frozen = params
        adapters = init_adapters(model, lora, jax.random.key(config.seed))
        state = init_state(adapters, optimizer, config.seed, model.mesh)
        del adapters
    del params  # the state's from here on; the first step takes their memory over

    def whole_params() -> Params:
        """What the model computes with now, adapters merged."""
        if frozen is None or lora is None:
            return state.params
        return jax.jit(merged, static_argnames="config")(frozen, state.params, config=lora)

    batches = iter(
        make_dataset(records, processor, config.data, steps=config.steps, seed=config.seed)
    )

    def evaluate(step: int) -> list[Score]:
        log.flush()
        answers = answer_records(
            *(model, whole_params(), processor, held_out),
            *(config.evaluation, config.data.date_string),
        )
        results = scores(answers)
        log.evaluation(step, results)
        return results

    def is_evaluated(step: int) -> bool:
        every = config.evaluation.every
        return bool(held_out) and every > 0 and step % every == 0

    output.mkdir(parents=True, exist_ok=True)
    with (
        open_checkpoints(output / "checkpoints", config.checkpoint) as checkpoints,
        Progress(checkpoints.latest_step or 0, config.steps, config.data.batch_size) as progress,
    ):
        resumed = checkpoints.latest_step or 0
        if resumed > config.steps:
            raise ValueError(
                f"{output}: its newest checkpoint is of step {resumed}, beyond steps="
                f"{config.steps}. Raise steps, or give another output."
            )
        if resumed:
            state = checkpoints.restore(state, batches)
        progress.say(_opening(config, output, resumed, model, state.params, records, held_out))
        metrics = None
        if jax.process_index() == 0:
            replace_text(output / "config.yaml", to_yaml(config))
            model.config.save_pretrained(output)
            _save_settings(output, model, processor)
            metrics = MetricsFile(output / "metrics.jsonl", resumed)
        log = _Log(metrics, progress)
        if 0 < resumed < config.steps and is_evaluated(resumed):
            evaluate(resumed)  # as the checkpoint was written before it

        for step, batch in enumerate(batches, start=resumed + 1):
            state, numbers = train_step(
                state,
                {name: place(x, model.mesh, *_axes(x)) for name, x in batch.items()},
                frozen,
                model=model,
                config=config.optimizer,
                steps=config.steps,
                lora=lora,
            )
            log.add(step, numbers)
            last = step == config.steps
            if step % config.log_every == 0 or last:
                log.flush()
            if step % config.checkpoint.every == 0 or last:
                log.flush()  # a resumed run finds the numbers of all steps before it
                checkpoints.save(state, batches)
            if is_evaluated(step) and not last:
                evaluate(step)

        results = evaluate(config.steps) if held_out else []
        if jax.process_count() > 1:
            progress.say(_without_model(output, lora is not None))
        else:
            save_model(output / "model", model, whole_params(), processor)
            progress.say(f"The model is in {output / 'model'}.")
    return results


def _check_batch(config: TrainConfig, model: MllamaForConditionalGeneration) -> None:
    groups = num_parts("batch", 0, model.mesh)
    if config.data.batch_size % groups:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} can't be split over the mesh {config.mesh}, "
            f"whose axes data and fsdp make {groups} groups: expected a multiple of {groups}"
        )


def _axes(x: np.ndarray) -> tuple[str | None, ...]:
    """Samples are split, the rest is not."""
    return ("batch", *[None] * (x.ndim - 1))


class _Log:
    """Numbers of steps on their way to the file and the screen.

    They wait on the device, so that no step is held up for being reported.
    """

    def __init__(self, file: MetricsFile | None, progress: Progress):
        """Args: the file, None in a job's other processes; what shows the last step."""
        self._file = file
        self._progress = progress
        self._waiting: list[tuple[int, Metrics]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        self._waiting.append((step, metrics))

    def flush(self) -> None:
        """Writes every waiting step and shows the last.

        Raises:
            FloatingPointError: a loss or a gradient norm is no finite number.
        """
        if not self._waiting:
            return
        for step, metrics in jax.device_get(self._waiting):
            numbers = {name: value.item() for name, value in metrics.items()}
            self._write(step, numbers)
            for name, called in (("loss", "the loss"), ("grad_norm", "the gradient norm")):
                if not math.isfinite(numbers[name]):
                    raise FloatingPointError(
                        f"step {step}: {called} is {numbers[name]}. Lower optimizer.learning_rate "
                        "or optimizer.max_grad_norm; the newest checkpoint is from before."
                    )
        self._waiting.clear()
        self._progress.report(step, numbers)

    def _write(self, step: int, numbers: Numbers) -> None:
        if self._file is not None:
            self._file.write(step, numbers)

    def evaluation(self, step: int, results: Sequence[Score]) -> None:
        """Writes and shows the scores of an evaluation; the steps before it are flushed."""
        accuracies = {f"accuracy/{score.kind}": score.accuracy for score in results}
        self._write(step, accuracies)
        self._progress.say(f"Held-out answers after step {step}:\n{table(results)}")


def _opening(
    config: TrainConfig,
    output: epath.Path,
    step: int,
    model: MllamaForConditionalGeneration,
    params: Params,
    records: Sequence[Record],
    held_out: Sequence[Record],
) -> str:
    """What the run is about to do, for the reader of the screen."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = jax.devices()[0].device_kind if model.mesh is None else describe(model.mesh)
    lines = [
        f"{size:,} parameters to train, {len(records):,} conversations, {len(held_out):,} held out",
        f"{device}; {config.model.dtype} with {config.model.param_dtype} parameters; attention "
        f"{config.model.attention}, rematerialisation {config.model.remat}",
    ]
    if config.lora.rank:
        names = ["/".join(path) for path in adapters_of(model, config.lora)]
        lines.append(f"adapters of rank {config.lora.rank} on {len(names)} stacks of projections:")
        lines += [f"  {name}" for name in names]
    if step:
        lines.append(
            f"Going on from step {step} of {config.steps}."
            if step < config.steps
            else f"All {step} steps are done; what comes after them is done again."
        )
        saved = output / "config.yaml"
        if saved.exists():
            changed = differences(saved.read_text(), config)
            lines += [f"  changed since: {change}" for change in changed]
    return "\n".join(lines)


def _without_model(output: epath.Path, is_lora: bool) -> str:
    """What becomes of a job of several processes, of which none can write the whole model."""
    if is_lora:
        return (
            f"The adapters are in {output / 'checkpoints'}. Started again in one process, on a "
            "mesh of its own devices, the run only merges them and writes the model folder."
        )
    return (
        f"The parameters are in {output / 'checkpoints'}; `mllama-jax convert {output} FOLDER` "
        "makes a model folder of them."
    )


def save_model(
    folder: epath.PathLike,
    model: MllamaForConditionalGeneration,
    params: Params,
    processor: MllamaProcessor,
) -> None:
    """Writes all that a Hugging Face folder holds: what `from_pretrained` reads, here and there."""
    model.save_pretrained(params, folder)
    _save_settings(folder, model, processor)


def _save_settings(
    folder: epath.PathLike, model: MllamaForConditionalGeneration, processor: MllamaProcessor
) -> None:
    """Writes tokenizer, chat template, image processor settings and generation settings."""
    processor.save_pretrained(folder)
    generation = model.generation_config or GenerationConfig.from_model_config(model.full_config)
    generation.save_pretrained(folder)
