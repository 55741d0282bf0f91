"""Quantised checkpoints are refused by name, and what only looks like one is not."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_checkpoint import random_params, tiny_config
from transformers import AwqConfig, FineGrainedFP8Config, GPTQConfig, QuantoConfig

from mllama_jax.convert import CheckpointError, save_params
from mllama_jax.convert.sources import open_source
from mllama_jax.convert.sources.quantised import refuse_quantised

WEIGHT = "language_model.model.layers.0.mlp.gate_proj.weight"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    config = tiny_config()
    save_params(random_params(config), config, folder, "model")
    return folder


def variant(plain: Path, folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """The plain checkpoint with entries in config.json and tensors added or replaced."""
    folder.mkdir()
    values = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    held = safetensors.numpy.load_file(plain / "model.safetensors")
    safetensors.numpy.save_file(held | tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": BNB}, r"bitsandbytes, 4 bits \(quantization_config in config"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bits"),
        ({"quantization_config": GPTQConfig(bits=4).to_dict()}, "GPTQ, 4 bits"),
        ({"quantization_config": AwqConfig().to_dict()}, "AWQ, 4 bits .*can't dequantise"),
        ({"quantization_config": FineGrainedFP8Config().to_dict()}, "with FP8 "),
        ({"quantization_config": QuantoConfig().to_dict()}, "with Quanto "),
        ({"quantization_config": {"quant_method": "torchao"}}, "with torchao "),
        ({"quantization_config": {"quant_method": "next"}}, "with the method 'next' "),
        ({"quantization_config": "yes"}, "with an unknown method "),
        ({"compression_config": {"format": "pack-quantized"}}, "with compressed-tensors "),
        ({"quantization": {"group_size": 64, "bits": 6}}, "with MLX, 6 bits "),
        (
            {"text_config": {"quantization_config": {"quant_method": "hqq"}}},
            r"with HQQ \(text_config\.quantization_config in",
        ),
    ],
)
def test_a_method_that_the_configuration_names(plain, tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        open_source(variant(plain, tmp_path / "quantised", config, {}))


@pytest.mark.parametrize(
    ("endings", "dtype", "message"),
    [
        ((".absmax", ".quant_state.bitsandbytes__nf4"), "uint8", r"4 bits \(NF4\)"),
        ((".absmax", ".quant_map"), "float32", "bitsandbytes, 4 bits"),
        (("SCB",), "float32", "bitsandbytes, 8 bits"),
        (("qweight", "qzeros", "scales"), "int32", "GPTQ or AWQ"),
        (("qweight", "qzeros", "scales", "g_idx"), "int32", r"GPTQ \(it holds .*g_idx"),
        (("weight_packed", "weight_scale"), "int32", "compressed-tensors"),
        (("weight_scale_inv",), "float32", "FP8 or 8-bit"),
        (("scales", "biases"), "float16", "MLX"),
    ],
)
def test_a_method_that_the_tensors_tell(plain, tmp_path, endings, dtype, message):
    stem = WEIGHT.removesuffix("weight")
    names = [WEIGHT + end if end[0] == "." else stem + end for end in endings]
    added = {name: np.zeros((42, 24), getattr(ml_dtypes, dtype, None) or dtype) for name in names}
    with pytest.raises(CheckpointError, match=message):
        open_source(variant(plain, tmp_path / "quantised", {}, added))


def test_the_refusal_says_what_to_do(plain, tmp_path):
    folder = variant(plain, tmp_path / "quantised", {"quantization_config": BNB}, {})
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    assert f"from_pretrained({str(folder)!r})\n  model.dequantize().save_pretr" in str(caught.value)
    assert "Convert the checkpoint that it was made from" in str(caught.value)


def test_gguf_files_are_named(tmp_path):
    for name in ("model-Q4_K_M.gguf", "mmproj.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"llama\.cpp \(GGUF files: mmproj\.gguf, model-Q4"):
        refuse_quantised({}, {}, tmp_path)


@pytest.mark.parametrize(
    "entry", [None, {}, {"quant_method": "bitsandbytes", "load_in_4bit": 0, "load_in_8bit": 0}]
)
def test_what_is_not_quantised_is_read(plain, tmp_path, entry):
    config = {"quantization_config": entry}
    source = open_source(variant(plain, tmp_path / "plain", config, {}))
    assert WEIGHT in source.tensors
