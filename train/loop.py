"""A training run from beginning to end; it reads from top to bottom."""

import grain
import jax

from mllama_jax.sharding import describe, device_kind
from mllama_jax.train.checkpoints import Checkpoints, open_checkpoints
from mllama_jax.train.components import rounding_warning
from mllama_jax.train.config import TrainConfig
from mllama_jax.train.config_file import differences, to_yaml
from mllama_jax.train.data.records import BadRecord, listed
from mllama_jax.train.data.skipped import SkippedRecords
from mllama_jax.train.evaluation import Score, scores
from mllama_jax.train.held_out import HeldOut
from mllama_jax.train.job import Job, open_job
from mllama_jax.train.log import Log
from mllama_jax.train.log_settings import check_installed
from mllama_jax.train.metrics import replace_text
from mllama_jax.train.profiling import Profiler
from mllama_jax.train.results import save_results, save_settings
from mllama_jax.train.step import TrainState, train_step_on
from mllama_jax.train.stopping import Stopped, Stopping
from mllama_jax.train.summary import write_summary


def train(config: TrainConfig) -> list[Score]:
    """Trains, or goes on from the newest checkpoint in ``config.output``; writes a model folder.

    ``config.output`` gets config.yaml, metrics.jsonl, speed.jsonl, checkpoints/ and, at the end,
    summary.html and model/: a Hugging Face folder with weights, configuration, tokenizer, chat
    template, image processor settings and generation settings. All of these but the weights also
    lie in ``config.output`` itself from the start: what reads or converts a checkpoint finds them
    there. The same configuration gives the same model, however often the run was stopped and
    started again.

    Returns:
        The scores on the held-out questions, empty if there are none.

    Raises:
        FileNotFoundError, ValueError: model, data or settings can't be used, or differ between
            the processes of a job.
        FloatingPointError: too many steps in a row had to be skipped.
        Stopped: SIGTERM or SIGINT stopped it; there is a checkpoint of the last step that it did.
    """
    check_installed(config.logging)
    job, state = open_job(config)
    batches, held_out = job.batches(), HeldOut(job) if job.held_out else None
    job.output.mkdir(parents=True, exist_ok=True)
    folder, origin = job.output / "checkpoints", job.origin()
    with open_checkpoints(folder, config.checkpoint, origin) as checkpoints:
        newest = checkpoints.latest_step or 0
        if newest > config.steps:
            raise ValueError(
                f"{job.output}: its newest checkpoint is of step {newest}, beyond steps="
                f"{config.steps}. Raise steps, or give another output."
            )
        damaged: list[str] = []
        state = checkpoints.restore(state, batches, damaged.append)
        resumed = int(state.step)
        with Log(job, resumed) as log:
            log.say("\n".join([*damaged, _opening(job, resumed)]))
            if warning := rounding_warning(state.params, config.optimizer.learning_rate):
                log.say(warning)
            if held_out and held_out.problems:
                log.say(f"Left out of the held-out loss:{listed(held_out.problems)}")
            if jax.process_index() == 0:
                replace_text(job.output / "config.yaml", to_yaml(config))
                job.model.config.save_pretrained(job.output)
                save_settings(job.output, job.model, job.processor)
            state = _run_steps(job, state, batches, checkpoints, held_out, log)
            log.say(save_results(job, state))  # before anything else that might go wrong
            results = _evaluated(held_out, state, log) if held_out else []
            if jax.process_index() == 0:
                log.say(write_summary(job.output, job.trained, to_yaml(config)))
    return results


def _run_steps(
    job: Job,
    state: TrainState,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints,
    held_out: HeldOut | None,
    log: Log,
) -> TrainState:
    """All steps that are left to do.

    Raises:
        Stopped: as `train`.
    """
    config, resumed = job.config, int(state.step)
    skipped = SkippedRecords(job.output, config.data.max_bad_records, job.sources.problems, resumed)
    if job.sources.problems:
        log.say(f"Nothing is learned from:{listed(job.sources.problems)}")
    profile = Profiler(job.output / "profile", config.logging.profile_steps)
    update = train_step_on(device_kind(job.model.mesh))
    with Stopping() as stopping, profile:
        if held_out and 0 < resumed < config.steps and held_out.is_due(resumed):
            _evaluated(held_out, state, log, stopping)  # as the checkpoint was written before it
        for step, batch in enumerate(log.timed(batches), start=resumed + 1):
            for problem in skipped.add(step, batch.problems):
                log.say(f"step {step}: nothing is learned from {problem}")
            profile.before(step)
            state, metrics = update(
                state, job.placed(batch), job.frozen, model=job.model, recipe=config.recipe
            )
            profile.after(step, metrics)
            log.add(step, metrics, batch, bad=len(skipped))
            is_last, is_asked = step == config.steps, stopping.asked()
            is_saved = step % config.checkpoint.every == 0 or is_last or is_asked
            if step % config.log_every == 0 or is_saved:
                log.flush()  # before the checkpoint: a resumed run finds the numbers until then
            if is_saved:
                checkpoints.save(state, batches)
            if held_out and not is_last and not is_asked and held_out.is_due(step):
                _evaluated(held_out, state, log, stopping)
                is_asked = stopping.by is not None
                if is_asked:
                    checkpoints.save(state, batches)
            if is_asked and not is_last:
                checkpoints.wait()
                assert stopping.by is not None
                raise Stopped(stopping.by, step)
    checkpoints.wait()
    return state


def _evaluated(
    held_out: HeldOut, state: TrainState, log: Log, stopping: Stopping | None = None
) -> list[Score]:
    """Asks the held-out questions; nothing is noted if it is told to stop in between."""
    log.flush()
    is_stopped = (lambda: False) if stopping is None else stopping.asked
    problems: list[BadRecord] = []
    answers = held_out.answers(state, is_stopped, problems)
    if stopping and stopping.by:
        return []
    loss = held_out.loss(state, is_stopped)
    if loss is None:
        return []
    log.evaluation(int(state.step), answers, loss, problems)
    return scores(answers)


def _opening(job: Job, step: int) -> str:
    """What the run is about to do, for the reader of the screen."""
    config, model = job.config, job.model
    device = device_kind(None) if model.mesh is None else describe(model.mesh)
    lines = [
        job.trained,
        f"{len(job.sources):,} conversations, {len(job.held_out):,} held out",
        *(f"  {line}" for line in job.sources.describe()),
        f"{device}; {config.model.dtype} with {config.model.param_dtype} parameters; attention "
        f"{config.model.attention}, rematerialisation {config.model.remat}",
    ]
    if step:
        lines.append(
            f"Going on from step {step} of {config.steps}."
            if step < config.steps
            else f"All {step} steps are done; what comes after them is done again."
        )
        saved = job.output / "config.yaml"
        if saved.exists():
            changed = differences(saved.read_text(), config)
            lines += [f"  changed since: {change}" for change in changed]
    return "\n".join(lines)
