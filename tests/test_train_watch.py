"""What a person watches of a run: numbers, curves, samples and the summary."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import metrics, write_records, write_start

from mllama_jax.plan.hardware import chip_of
from mllama_jax.train.components import component_of
from mllama_jax.train.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)
from mllama_jax.train.data.batches import HostBatch
from mllama_jax.train.flops import Counts, counts, step_flops
from mllama_jax.train.held_out import HeldOut
from mllama_jax.train.job import open_job
from mllama_jax.train.log_settings import LoggingConfig
from mllama_jax.train.loop import train
from mllama_jax.train.settings import LoraConfig, Recipe
from mllama_jax.train.speed import Speed, memory
from mllama_jax.train.step import train_step

HALF, STEPS, RECORDS = 5, 10, 24


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("watch")
    write_start(path / "start")
    write_records(path / "train.jsonl", RECORDS, text_only=False)
    data = str(path / "train.jsonl")
    return TrainConfig(
        output=str(path / "run"),
        steps=STEPS,
        log_every=2,
        model=ModelConfig(str(path / "start")),
        trained=TrainedConfig("all"),
        data=DataConfig(train=data, held_out=data, batch_size=6, lengths=(32,)),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        checkpoint=CheckpointConfig(every=HALF),
        evaluation=EvaluationConfig(every=HALF, batch_size=5, max_new_tokens=4, limit=7),
        logging=LoggingConfig(tensorboard=True, samples=3),
    )


@pytest.fixture(scope="module")
def run(config):
    """The folder of a run whose second half was done twice."""
    train(config)
    folder = Path(config.output)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    train(config)
    return folder


def test_speed_is_written_apart_from_the_numbers_that_a_resumed_run_repeats(run):
    lines = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10]
    assert [line["steps"] for line in lines] == [2, 2, 1, 1, 2, 2]
    for line in lines:
        assert line["step_seconds"] == pytest.approx(line["seconds"] / line["steps"])
        assert 0 <= line["wait_seconds"] <= line["seconds"]
        assert line["tokens_per_second"] > line["images_per_second"] > 0
        assert line["host_peak_gib"] > 0.05
        assert "mfu" not in line  # of a CPU no peak is known
    assert lines[0]["compile_seconds"] > 0
    of_steps = {name for line in metrics(run) for name in line}
    assert of_steps & set(lines[0]) == {"step"}


def test_tensorboard_reads_each_point_once(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    written = {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}
    read = events.Scalars("train/loss")
    assert [point.step for point in read] == list(range(1, STEPS + 1))
    assert [point.value for point in read] == pytest.approx(list(written.values()))
    assert events.Scalars("speed/tokens_per_second")[-1].value > 0
    of_evaluations = str(run / "tensorboard" / "held_out")
    events = EventAccumulator(of_evaluations, size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    losses = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    read = events.Scalars("held_out/eval_loss")
    assert [point.step for point in read] == [HALF, STEPS]  # of the first, which was done twice
    assert [point.value for point in read] == pytest.approx(list(losses.values()))
    [*_, shown] = events.Images("samples/2/picture_1")
    assert (shown.height, shown.step) == (12, STEPS)


def test_samples_are_a_page_with_pictures(run):
    page = (run / "samples" / f"step_{STEPS:08d}.html").read_text()
    assert page.count("<article") == 3
    assert page.count("data:image/jpeg;base64,") == 3
    assert "Even or odd?" in page
    assert "It is even." in page


def test_the_summary_shows_the_end(run):
    page = (run / "summary.html").read_text()
    last = metrics(run)[-1]
    assert f"{last['eval_loss']:.4f}" in page
    assert "learning_rate: 0.01" in page
    with Image.open(run / "summary.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels < 250).any(-1).mean() > 0.02


TRACED = """
import sys
import jax.numpy as jnp
from pathlib import Path
from etils import epath
from mllama_jax.train.profiling import Profiler

folder = epath.Path(sys.argv[1])
with Profiler(folder, (2, 3)) as profiler:
    for step in (1, 2, 3, 4):
        assert bool(list(Path(folder).rglob("*.xplane.pb"))) == (step == 4), step
        profiler.before(step)
        profiler.after(step, jnp.ones(3).sum())
with Profiler(folder / "none", ()) as profiler:
    profiler.before(1)
    profiler.after(1, jnp.ones(3))
"""


def test_the_steps_that_were_asked_for_are_traced(tmp_path):
    """In a process of its own, which has no more than one profiler."""
    subprocess.run([sys.executable, "-c", TRACED, str(tmp_path)], check=True)
    [trace] = tmp_path.rglob("*.xplane.pb")
    assert b"train" in trace.read_bytes()
    assert not (tmp_path / "none").exists()


def test_the_held_out_loss_is_that_of_a_step_on_the_same_conversations(config):
    data = replace(config.data, batch_size=RECORDS)
    config = replace(config, data=data, evaluation=replace(config.evaluation, limit=None))
    job, state = open_job(config)
    for batch_size in (5, 7, RECORDS):
        settings = replace(config.evaluation, batch_size=batch_size)
        held_out = HeldOut(replace(job, config=replace(config, evaluation=settings)))
        loss = held_out.loss(state)
        if batch_size != 5:
            assert loss == pytest.approx(before, rel=1e-6)
        before = loss
    batch = next(job.batches())
    assert batch.num_examples == RECORDS
    recipe = replace(config.recipe, optimizer=replace(config.optimizer, z_loss=0.0))
    _, found = train_step(state, job.placed(batch), job.frozen, model=job.model, recipe=recipe)
    assert found["loss"].item() == pytest.approx(before, rel=1e-6)


def test_operations_are_six_for_each_weight_and_token_it_meets(config):
    """Forward 2; 2 for the gradient of the input, if anything before is trained; 2 for its own."""
    job, state = open_job(config)
    model = job.model
    sizes = dict.fromkeys(("self_attention", "cross", "image", "head"), 0)
    for path, leaf in flax.traverse_util.flatten_dict(state.params).items():
        component = component_of(model, path)
        if path[-1] != "kernel" or component not in ("self_attention", "cross_attention", "head"):
            continue
        if component == "cross_attention":
            component = "image" if path[-2] in ("k_proj", "v_proj") else "cross"
        sizes[component] += leaf.size
    everything = step_flops(model, Recipe(10, trained=TrainedConfig("all")))
    assert everything.tokens == 6 * sizes["self_attention"]
    assert everything.labels == 6 * sizes["head"]
    assert everything.seeing == 6 * sizes["cross"]
    assert everything.image_tokens == 6 * sizes["image"]

    frozen = step_flops(model, Recipe(10, trained=TrainedConfig("cross_attention")))
    # The first layer is before all that is trained.
    assert frozen.tokens == 2 * sizes["self_attention"]
    assert frozen.labels == 4 * sizes["head"]
    assert frozen.images < everything.images

    lora = Recipe(10, trained=TrainedConfig("lora"), lora=LoraConfig(rank=3))
    state, _ = jax.eval_shape(lambda p: _start(model, p, lora), state.params)
    adapters = {"tokens": 0, "seeing": 0, "image_tokens": 0}
    for path, leaf in flax.traverse_util.flatten_dict(state).items():
        is_image = path[-2] in ("k_proj", "v_proj")
        is_cross = component_of(model, path[:-1]) == "cross_attention"
        field = ("image_tokens" if is_image else "seeing") if is_cross else "tokens"
        adapters[field] += leaf.size
    found = step_flops(model, lora)
    assert found.seeing == 4 * sizes["cross"] + 6 * adapters["seeing"]
    assert found.tokens == 4 * sizes["self_attention"] + 6 * adapters["tokens"]
    assert found.labels == 4 * sizes["head"]


def _start(model, params, recipe):
    from mllama_jax.train.step import start

    state, frozen = start(model, params, recipe, 0)
    return state.params, frozen


def test_padding_is_not_counted(config):
    job, _ = open_job(config)
    patches = job.model.config.vision_config.num_patches
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32)
    labels = np.array([[7, -100, 7, -100], [7, 7, -100, -100]], np.int32)
    text = {"attention_mask": mask, "labels": labels}
    assert counts(text, job.model.config) == Counts(tokens=5, pairs=6 + 3, labels=1 + 1)
    segments = np.array([[1, 1, 2, 0], [1, 1, 0, 0]], np.int32)
    seen = np.zeros((2, 4, 2, 4), np.int32)
    seen[0, 1:, 0, :3] = 1  # of padding, too
    arrays = {
        "segment_ids": segments,
        "labels": labels,
        "pixel_values": np.zeros(0),
        "aspect_ratio_ids": np.array([[5, 0], [0, 0]]),
        "aspect_ratio_mask": np.array([[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0]] * 2]),
        "cross_attention_mask": seen,
    }
    assert counts(arrays, job.model.config) == Counts(
        tokens=5,
        pairs=3 + 1 + 3,
        labels=0 + 1,  # the other one is the first token of a text
        seeing=2,
        images=1,
        image_tokens=3 * patches,
        seen=6 * patches,
    )


class Busy:
    """Stands for a number that the device is busy with until it is told otherwise."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def block_until_ready(self) -> None:
        time.sleep(max(0.0, self._end - time.monotonic()))


@pytest.mark.parametrize(("busy", "fewest"), [(0.0, 0.19), (0.1, 0.05), (2, 0)])
def test_waiting_is_what_the_device_has_nothing_to_do_for(config, busy, fewest):
    """A batch that comes 0.2 seconds after it was asked for, and a step before it."""
    job, _ = open_job(config)
    batch = next(job.batches())

    def batches() -> Iterator[HostBatch]:
        yield batch
        time.sleep(0.2)
        yield batch

    with Speed(job) as speed:
        timed = speed.timed(batches())
        next(timed)
        speed.measured()
        speed.dispatched(Busy(busy))
        next(timed)
        found = speed.measured()
    assert fewest <= found["wait_seconds"] <= max(0.0, found["seconds"] - busy + 0.02)


def test_what_is_asked_for_must_be_there_and_make_sense(config):
    with pytest.raises(ValueError, match="pip install wandb"):
        train(replace(config, logging=LoggingConfig(wandb_project="mine")))
    data = replace(config.data, held_out=None)
    for key in ("evaluation.every=5", "logging.samples=3"):
        with pytest.raises(ConfigError, match=f"{key}: .* give data.held_out"):
            replace(config, data=data)
    with pytest.raises(ConfigError, match=r"profile_steps=\[3, 2\]"):
        replace(config, logging=LoggingConfig(profile_steps=(3, 2)))


def test_peaks_and_memory():
    known = {"TPU v5 lite": 197e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H200": 989e12}
    for kind, peak in known.items():
        chip = chip_of(kind)
        assert chip is not None
        assert chip.peak_flops == peak
    assert chip_of("cpu") is None
    assert memory()["host_peak_gib"] > 0.05
