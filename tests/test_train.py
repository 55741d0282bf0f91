"""Training runs: they learn, and a run that was stopped ends as if it had not been."""

import json
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from jax.experimental import multihost_utils
from tiny_run import assert_same_end, metrics, write_records, write_start

import mllama_jax as mj
from mllama_jax.cli import main
from mllama_jax.convert import convert, verify
from mllama_jax.processing.image_loading import load_image
from mllama_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)
from mllama_jax.train.config_file import load_config, to_yaml
from mllama_jax.train.data.records import DataError
from mllama_jax.train.data.sources import read_records
from mllama_jax.train.loop import train
from mllama_jax.train.optimizers import learning_rates
from mllama_jax.train.stopping import Stopping

STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    write_start(path / "start")
    write_records(path / "train.jsonl", text_only=False)
    return path


@pytest.fixture(scope="module")
def config(folder):
    data = str(folder / "train.jsonl")
    return TrainConfig(
        output=str(folder / "whole"),
        steps=STEPS,
        log_every=1,
        model=ModelConfig(str(folder / "start")),
        trained=TrainedConfig("all"),
        data=DataConfig(train=data, held_out=data, batch_size=6, lengths=(32,)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        checkpoint=CheckpointConfig(every=4),
        evaluation=EvaluationConfig(every=14, batch_size=4, max_new_tokens=4, limit=4),
    )


@pytest.fixture(scope="module")
def whole(config):
    """The folder of a run that nothing stopped."""
    results = train(config)
    assert [score.kind for score in results] == ["seen", "all"]
    return Path(config.output)


def test_the_loss_falls_and_every_step_is_written(whole):
    lines = metrics(whole)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < 0.2 * steps[0]["loss"]
    assert steps[0]["learning_rate"] == 0
    assert steps[3]["learning_rate"] == pytest.approx(1e-2)
    assert all(line["labels"] > 0 and line["grad_norm"] > 0 for line in steps)
    evaluations = [line["step"] for line in lines if "accuracy/all" in line]
    assert evaluations == [14, 28, 30]
    assert set(lines[-1]) == {"step", "eval_loss", "accuracy/seen", "accuracy/all"}


def test_the_model_folder_holds_all_that_the_start_held(whole, folder):
    names = {file.name for file in (folder / "start").iterdir()}
    assert names <= {file.name for file in (whole / "model").iterdir()}
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(whole / "model")
    start, before = mj.MllamaForConditionalGeneration.from_pretrained(folder / "start")
    assert model.config == start.config
    assert model.generation_config == start.generation_config
    unchanged = jax.tree.map(lambda a, b: bool((a == b).all()), params, before)
    assert not any(jax.tree.leaves(unchanged))
    text = "Is <|image|>this odd?"
    found, expected = (
        mj.MllamaProcessor.from_pretrained(path).tokenizer.encode(text)
        for path in (whole / "model", folder / "start")
    )
    assert found == expected


def test_checkpoints_are_models_of_any_tool(whole, tmp_path):
    """The last one is the model that the run ended with, and an earlier one is another."""
    assert convert(whole, tmp_path / "last").to == "hf"
    written = {file.name for file in (whole / "model").iterdir()}
    assert written | {"provenance.json"} == {file.name for file in (tmp_path / "last").iterdir()}
    for name in written - {"config.json"}:
        assert (tmp_path / "last" / name).read_bytes() == (whole / "model" / name).read_bytes()
    expected = mj.MllamaConfig.from_pretrained(whole / "model")
    assert mj.MllamaConfig.from_pretrained(tmp_path / "last") == expected

    checkpoints = whole / "checkpoints"
    assert verify(checkpoints, whole / "model").equal
    assert verify(checkpoints / str(STEPS), whole / "model").equal
    assert len(verify(checkpoints / "28", whole / "model").differing) > 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_loads_the_model_folder(whole, folder):
    from transformers import AutoProcessor
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

    reference, report = MllamaForConditionalGeneration.from_pretrained(
        whole / "model", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    assert reference.generation_config.max_new_tokens == 16
    [record] = read_records(folder / "train.jsonl")[:1]
    inputs = []
    for processor in (
        AutoProcessor.from_pretrained(whole / "model"),
        mj.MllamaProcessor.from_pretrained(whole / "model"),
    ):
        prompt = processor.apply_chat_template(list(record.question), add_generation_prompt=True)
        pictures = [load_image(path) for path in record.images]
        inputs.append(
            processor(images=pictures, text=prompt, add_special_tokens=False, return_tensors="np")
        )
    theirs, ours = inputs
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(
        whole / "model", hf_masked_rows=True
    )
    found = jax.jit(model.apply)({"params": params}, **ours).logits
    with torch.no_grad():
        tensors = {name: torch.from_numpy(np.asarray(values)) for name, values in theirs.items()}
        expected = reference(**tensors).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(config, whole, tmp_path, capfd):
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoints", resumed / "checkpoints")
    shutil.copy(whole / "metrics.jsonl", resumed)
    shutil.copy(whole / "config.yaml", resumed)
    shutil.rmtree(resumed / "checkpoints" / str(STEPS))
    # As if killed before the evaluation that follows this checkpoint, in the middle of a line.
    lines = (resumed / "metrics.jsonl").read_text().splitlines()
    (resumed / "metrics.jsonl").write_text("\n".join([*lines[:29], '{"step": 29, "lo']))
    train(replace(config, output=str(resumed)))
    printed, errors = capfd.readouterr()
    assert f"Going on from step 28 of {STEPS}" in printed
    assert "changed since: output:" in printed
    number = r"[\d.]+(e[+-]\d+)?"
    progress = rf"loss {number}  lr {number}  grad {number}  labels \d+  {number} tokens/s .*"
    for step in (29, 30):
        assert re.search(rf"^step {step}/{STEPS}  {progress}$", printed, re.MULTILINE)
    assert "\r" not in printed + errors
    assert_same_end(resumed, whole)


def test_a_finished_run_is_completed_and_not_changed(config, whole, tmp_path, capfd):
    """Killed while it wrote the model, the run writes it again; otherwise nothing changes."""
    finished = tmp_path / "finished"
    shutil.copytree(whole, finished)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (finished / "model" / name).unlink()
    (finished / "model" / ".model.safetensors.incomplete").write_bytes(b"half")
    first = train(replace(config, output=str(finished)))
    assert f"All {STEPS} steps are done" in capfd.readouterr().out
    assert_same_end(finished, whole)
    written, expected = (
        {file.name: file.read_bytes() for file in (run / "model").iterdir()}
        for run in (finished, whole)
    )
    assert written == expected
    assert train(replace(config, output=str(finished))) == first
    assert_same_end(finished, whole)


def test_a_checkpoint_of_another_model_is_refused(config, folder, whole, tmp_path):
    other, output = tmp_path / "other", tmp_path / "run"
    shutil.copytree(folder / "start", other)
    shutil.copytree(whole / "checkpoints", output / "checkpoints")
    values = json.loads((other / "config.json").read_text())
    values["text_config"]["intermediate_size"] += 4
    model = mj.MllamaForConditionalGeneration(mj.MllamaConfig.from_dict(values))
    shapes = model.param_shapes()
    model.save_pretrained(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes), other)
    with pytest.raises(ValueError, match="of another model") as error:
        train(replace(config, output=str(output), model=ModelConfig(str(other))))
    assert "block_1/mlp/up_proj/kernel: (1, 24, 40), expected (1, 24, 44)" in str(error.value)


def test_a_run_that_is_beyond_its_steps_is_refused(config, whole):
    with pytest.raises(ValueError, match=f"step {STEPS}.*steps=20"):
        train(replace(config, steps=20))


def strict(config: TrainConfig, output: Path, start: Path) -> TrainConfig:
    """A run that ends at the third skipped step in a row, with a checkpoint of every step."""
    return replace(
        config,
        output=str(output),
        model=ModelConfig(str(start)),
        optimizer=replace(config.optimizer, max_skipped=2),
        checkpoint=CheckpointConfig(every=1),
    )


def test_a_loss_that_is_no_number_stops_the_run(config, folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder / "start", broken)
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(broken)
    params["language_model"]["model"]["norm"]["scale"] *= jnp.nan
    model.save_pretrained(params, broken)
    output = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan.* 3 steps in a row"):
        train(strict(config, output, broken))
    assert not (output / "model").exists()


def test_gradients_that_are_no_numbers_stop_the_run(config, folder, tmp_path):
    """And until then they change nothing: the checkpoints hold what it started with."""
    steep, output = tmp_path / "steep", tmp_path / "run"
    shutil.copytree(folder / "start", steep)
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(steep)
    params["language_model"]["lm_head"]["kernel"] *= 1e25  # the norm's square is too large
    model.save_pretrained(params, steep)
    with pytest.raises(FloatingPointError, match=r"step 3: .*the gradient norm inf"):
        train(strict(config, output, steep))
    assert verify(output / "checkpoints" / "2", steep).equal


def test_pictures_of_held_out_data_are_looked_for_first(config, folder, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    line = (folder / "train.jsonl").read_text().splitlines()[0]
    held_out.write_text(line)  # its pictures lie beside the other file
    output = tmp_path / "run"
    data = replace(config.data, held_out=str(held_out))
    with pytest.raises(DataError, match=rf"{held_out}:1: there is no picture '{tmp_path}/"):
        train(replace(config, output=str(output), data=data))
    assert not output.exists()


def test_a_held_out_picture_that_can_not_be_read_costs_neither_model_nor_scores(
    config, folder, tmp_path, capfd
):
    data, output = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for file in (*folder.glob("*.png"), folder / "train.jsonl"):
        shutil.copy(file, data)
    (data / "0.png").write_bytes(b"no picture")
    held_out = str(data / "train.jsonl")
    run = replace(config, output=str(output), steps=4, data=replace(config.data, held_out=held_out))
    [seen, whole] = train(replace(run, evaluation=replace(run.evaluation, limit=None)))
    assert seen.asked == whole.asked == 23
    last = metrics(output)[-1]
    assert (last["eval_unreadable"], last["eval_loss"] > 0) == (1, True)
    assert (output / "model" / "model.safetensors").exists()
    printed = capfd.readouterr().out
    assert f"Held-out questions that could not be asked, 1:\n  {held_out}:1: image 0" in printed


def test_all_processes_of_a_job_stop_within_an_evaluation(monkeypatch):
    """Every question whether to stop is a place to stop at."""
    asked = []

    def reached(place: int) -> bool:
        asked.append(place)
        return place == 4

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    with Stopping() as stopping:
        assert [stopping.asked() for _ in range(6)] == [False] * 3 + [True] * 3
    assert asked == [1, 2, 3, 4, 5, 6]
    assert stopping.by == signal.SIGTERM


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``mllama-jax train`` in this process; returns what it printed."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mllama-jax", "train", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


def test_the_command_prints_every_setting(command, config, tmp_path):
    file, copy = tmp_path / "train.yaml", tmp_path / "copy.yaml"
    file.write_text("steps: 3\nmodel: {path: a}\ndata: {train: b}\noutput: c\n")
    printed = command(file, "optimizer.learning_rate=2e-3", "steps=5", "--print-config")
    copy.write_text(printed)
    assert load_config(copy).steps == 5
    assert load_config(copy).optimizer == OptimizerConfig(learning_rate=2e-3)
    assert yaml.safe_load(printed).keys() == yaml.safe_load(to_yaml(config)).keys()
    assert not (tmp_path / "c").exists()


def test_mistakes_end_the_command_in_one_line(command, config, whole, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(to_yaml(config))
    for word, expected in {
        "step=1": "did you mean 'steps'?",
        f"data.train={tmp_path}/absent.jsonl": "There is no data file",
        f"model.path={tmp_path}/absent": "There is no folder",
        "data.batch_size=99": "fewer than data.batch_size=99",
        "steps=20": "beyond steps=20",
        "model.attention=flash": "expected reference or xla",
    }.items():
        with pytest.raises(SystemExit, match=re.escape(expected)):
            command(file, word)
    with pytest.raises(SystemExit, match="There is no configuration file"):
        command(tmp_path / "absent.yaml")


def test_learning_rates_rise_and_fall():
    schedule = learning_rates(OptimizerConfig(learning_rate=2.0, warmup_steps=4), steps=12)
    rates = np.array([schedule(step) for step in range(13)])
    np.testing.assert_allclose(rates[:5], [0, 0.5, 1, 1.5, 2])
    assert (np.diff(rates[4:]) < 0).all()
    assert rates[-1] == pytest.approx(0.2)
    assert learning_rates(OptimizerConfig(learning_rate=2.0), steps=12)(0) == 2.0
