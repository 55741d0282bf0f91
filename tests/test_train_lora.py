"""Runs with adapters from beginning to end: what they leave, and who loads it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from tiny_run import metrics, tiny_config, write_processor, write_records
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

import mllama_jax as mj
from mllama_jax.convert import verify
from mllama_jax.processing.image_loading import load_image
from mllama_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainedConfig,
)
from mllama_jax.train.data.sources import read_records
from mllama_jax.train.loop import train
from mllama_jax.train.settings import ComponentConfig

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    """Of a model whose inner axes are as long as groups of int4."""
    folder = tmp_path_factory.mktemp("lora")
    write_processor(folder / "start")
    values = tiny_config().to_dict()
    values["text_config"] |= {"hidden_size": 64, "intermediate_size": 48}
    model = mj.MllamaForConditionalGeneration(mj.MllamaConfig.from_dict(values))
    params = model.init_params(jax.random.key(0))
    layers = params["language_model"]["model"]["layers"]
    gates = ("cross_attn_attn_gate", "cross_attn_mlp_gate")
    layers["block_1"] |= {name: layers["block_1"][name] + 0.7 for name in gates}
    model.save_pretrained(params, folder / "start")
    write_records(folder / "train.jsonl", 8, text_only=False)
    return TrainConfig(
        output=str(folder / "run"),
        steps=STEPS,
        model=ModelConfig(str(folder / "start")),
        trained=TrainedConfig("lora"),
        data=DataConfig(str(folder / "train.jsonl"), batch_size=2, lengths=(32,)),
        optimizer=OptimizerConfig(learning_rate=3e-2, schedule="constant"),
        checkpoint=CheckpointConfig(every=STEPS),
    )


@pytest.fixture(scope="module", params=["int8", "int4", "nf4"])
def run(request, config) -> TrainConfig:
    """A finished run beside integers."""
    model = replace(config.model, quantise=request.param)
    run = replace(config, output=f"{config.output}_{request.param}", model=model)
    train(run)
    return run


def inputs_of(config: TrainConfig) -> dict[str, np.ndarray]:
    processor = mj.MllamaProcessor.from_pretrained(config.model.path)
    [record] = read_records(str(config.data.train))[:1]
    prompt = processor.apply_chat_template(list(record.question), add_generation_prompt=True)
    pictures = [load_image(path) for path in record.images]
    return dict(
        processor(images=pictures, text=prompt, add_special_tokens=False, return_tensors="np")
    )


def logits(folder: str | Path, inputs: dict[str, Any], **options: Any) -> np.ndarray:
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(
        folder, hf_masked_rows=True, **options
    )
    return np.asarray(jax.jit(model.apply)({"params": params}, **inputs).logits)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_an_adapter_trained_beside_integers_is_read_by_peft_and_by_us(run):
    output, inputs = Path(run.output), inputs_of(run)
    found = logits(output / "model", inputs)
    base = MllamaForConditionalGeneration.from_pretrained(
        run.model.path, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, output / "adapter")
    with torch.no_grad():
        tensors = {name: torch.from_numpy(np.asarray(values)) for name, values in inputs.items()}
        expected = theirs(**tensors).logits.numpy()
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-4 * largest, rtol=0)
    np.testing.assert_allclose(
        logits(output / "adapter", inputs), expected, atol=1e-4 * largest, rtol=0
    )
    assert np.abs(logits(run.model.path, inputs) - expected).max() > 0.05 * largest


def test_what_is_learned_from_is_the_rounded_model(run, config):
    """Before the first step adapters add nothing: its loss is that of the integers alone."""
    first = metrics(Path(run.output))[0]["loss"]
    exact = replace(config, output=f"{config.output}_{run.model.quantise}_exact", steps=1)
    train(replace(exact, optimizer=replace(config.optimizer, learning_rate=1e-9)))
    difference = abs(metrics(Path(exact.output))[0]["loss"] / first - 1)
    assert 1e-7 < difference < 0.05


def test_a_projector_trained_beside_adapters_is_in_the_model_alone(config, capfd):
    output = Path(f"{config.output}_mixed")
    trained = TrainedConfig("lora", projector=ComponentConfig("full"))
    train(replace(config, output=str(output), trained=trained))
    said = "There is no adapter folder: what was trained as a whole (projector) has no place in it."
    assert said in capfd.readouterr().out
    assert not (output / "adapter").exists()
    differing = verify(config.model.path, output / "model").differing
    assert any("multi_modal_projector" in str(tensor) for tensor in differing)
    assert any("q_proj" in str(tensor) for tensor in differing)
