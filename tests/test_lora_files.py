"""LoRA adapters merged into their base, against PEFT's own `merge_and_unload`."""

import json
import math
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from etils import epath
from tiny_checkpoint import arrays, random_params, stored, tiny_config
from transformers.models import mllama as hf

from mllama_jax.convert import CheckpointError, convert, save_params
from mllama_jax.convert.lazy import ArrayTensor, read_whole
from mllama_jax.convert.sources import open_source
from mllama_jax.convert.sources.lora import Merged, adapter_base, adapter_base_revision, open_lora
from mllama_jax.convert.sources.source import Source

# What PEFT says of embeddings that are tied (they are not) or that it saves in addition.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

EPS = np.finfo(np.float32).eps

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["o_proj", "fc2"]},
    "everywhere": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"},
    "regex": {
        "r": 3,
        "target_modules": r"model\.language_model\.layers\.[0-3]\.mlp\.(up|down)_proj",
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "fc1", "gate_proj", "multi_modal_projector"],
        "rank_pattern": {"cross_attn.q_proj": 3, r"layers\.[12]\.mlp\.fc1": 5, "_proj": 99},
        "alpha_pattern": {"model.language_model.layers.0.mlp.gate_proj": 0.5, "q_proj": 2},
    },
    "whole modules": {
        "r": 4,
        "target_modules": ["q_proj"],
        "modules_to_save": ["multi_modal_projector", "lm_head", "embed_tokens", "norm"],
    },
    "biases": {"r": 2, "target_modules": ["fc1"], "bias": "all"},
    "convolution": {"r": 3, "target_modules": ["patch_embedding", "k_proj"]},
    "embedding": {"r": 3, "target_modules": ["embed_tokens", "down_proj"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """The same tiny model in two dtypes."""
    config = tiny_config(rope_scaling={"rope_type": "default"})
    found = {}
    for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        found[name] = tmp_path_factory.mktemp(name)
        save_params(random_params(config, dtype=dtype), config, found[name], "model")
    return found


def saved_adapter(base: Path, folder: Path, model_cls=None, safetensors=True, **config) -> Path:
    """An adapter that PEFT makes, fills with random numbers and saves."""
    model = peft.get_peft_model(reference(base, model_cls), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    model.save_pretrained(folder, safe_serialization=safetensors)
    return folder


def reference(base: Path, model_cls=None) -> torch.nn.Module:
    model_cls = model_cls or hf.MllamaForConditionalGeneration
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[next(iter(stored(base).values()))[0]]
    return model_cls.from_pretrained(base, torch_dtype=dtype)


def merged_by_peft(base: Path, adapter: Path, folder: Path, model_cls=None) -> dict:
    """Hub name -> values of the merged model."""
    model = peft.PeftModel.from_pretrained(reference(base, model_cls), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return arrays(folder)


def values(source: Source) -> dict[str, np.ndarray]:
    return {name: read_whole(tensor) for name, tensor in source.tensors.items()}


def merged_by_us(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    return values(open_lora(epath.Path(adapter), open_source(base)))


def assert_merged_alike(found: dict, expected: dict, base: dict) -> None:
    """Untouched and replaced tensors to the bit; merged ones to float32's rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        # Sums of up to 5 products of numbers around 1, scaled by at most 3.
        np.testing.assert_allclose(found[name], value, rtol=4 * EPS, atol=64 * EPS, err_msg=name)
        if np.array_equal(value, base[name]):
            assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_adapter_is_what_peft_makes_of_it(bases, tmp_path, name):
    base = bases["float32"]
    adapter = saved_adapter(base, tmp_path / "adapter", **CONFIGS[name])
    expected = merged_by_peft(base, adapter, tmp_path / "merged")
    before = arrays(base)
    changed = {key for key, value in expected.items() if np.abs(value - before[key]).max() > 0.1}
    assert len(changed) > 5
    assert changed == {k for k, v in expected.items() if not np.array_equal(v, before[k])}
    assert_merged_alike(merged_by_us(base, adapter), expected, before)


def test_a_bfloat16_base_is_rounded_once(bases, tmp_path):
    base = bases["bfloat16"]
    adapter = saved_adapter(base, tmp_path / "adapter", **CONFIGS["everywhere"])
    expected = merged_by_peft(base, adapter, tmp_path / "merged")
    found = merged_by_us(base, adapter)
    assert found.keys() == expected.keys()
    steps = []
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == ml_dtypes.bfloat16
        # On the bits' own scale, neighbouring numbers are 1 apart.
        ours, theirs = (np.asarray(v).view(np.int16).astype(int) for v in (found[name], value))
        ours, theirs = (np.where(v < 0, -(v & 0x7FFF), v) for v in (ours, theirs))
        steps.append(np.abs(ours - theirs).ravel())
    steps = np.concatenate(steps)
    assert steps.max() <= 1
    assert steps.mean() < 1e-3


def in_hub_layout(name: str) -> str:
    """What transformers before 4.52 called a module."""
    for old, new in (
        ("model.model.language_model.", "model.language_model.model."),
        ("model.lm_head.", "model.language_model.lm_head."),
        ("model.model.vision_model.", "model.vision_model."),
        ("model.model.multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(f"base_model.{old}"):
            return name.replace(old, new, 1)
    raise AssertionError(name)


def with_adapters_name(name: str) -> str:
    """What the state dict of a model with an adapter calls a tensor."""
    name = re.sub(r"(lora_[AB])\.", r"\1.default.", name)
    return name.replace("lm_head.", "lm_head.modules_to_save.default.")


@pytest.mark.parametrize("renamed", [in_hub_layout, with_adapters_name])
def test_an_adapters_names_may_be_of_any_layout(bases, tmp_path, renamed):
    base = bases["float32"]
    adapter = saved_adapter(base, tmp_path / "adapter", **CONFIGS["whole modules"])
    expected = merged_by_peft(base, adapter, tmp_path / "merged")
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert any(renamed(name) != name for name in tensors)
    safetensors.torch.save_file({renamed(name): t for name, t in tensors.items()}, file)
    assert_merged_alike(merged_by_us(base, adapter), expected, arrays(base))


def test_an_adapter_may_be_a_torch_file(bases, tmp_path):
    base = bases["float32"]
    adapter = saved_adapter(base, tmp_path / "adapter", safetensors=False, **CONFIGS["patterns"])
    assert not (adapter / "adapter_model.safetensors").exists()
    expected = merged_by_peft(base, adapter, tmp_path / "merged")
    assert_merged_alike(merged_by_us(base, adapter), expected, arrays(base))


def test_a_half_precision_adapter_is_merged_in_float32(bases, tmp_path):
    base = bases["float32"]
    adapter = saved_adapter(base, tmp_path / "adapter", **CONFIGS["patterns"])
    file = adapter / "adapter_model.safetensors"
    halves = {name: tensor.half() for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(halves, file)
    expected = merged_by_peft(base, adapter, tmp_path / "merged")
    assert_merged_alike(merged_by_us(base, adapter), expected, arrays(base))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module")
def test_fan_in_fan_out_is_passed_over_as_peft_does(bases, tmp_path):
    base = bases["float32"]
    config = {**CONFIGS["plain"], "target_modules": ["gate_proj"]}
    adapter = saved_adapter(base, tmp_path / "adapter", **config)
    change_config(adapter, fan_in_fan_out=True)
    expected = merged_by_peft(base, adapter, tmp_path / "merged")
    assert_merged_alike(merged_by_us(base, adapter), expected, arrays(base))


def change_config(adapter: Path, **changes) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_text_models_adapter_is_merged_into_the_whole_model(bases, tmp_path):
    config = tiny_config(rope_scaling={"rope_type": "default"})
    text = tmp_path / "text"
    params = random_params(config)["language_model"]
    save_params(params, config.text_config, text, "language_model")
    adapter = saved_adapter(text, tmp_path / "adapter", hf.MllamaForCausalLM, **CONFIGS["plain"])
    expected = merged_by_peft(text, adapter, tmp_path / "merged", hf.MllamaForCausalLM)
    found = merged_by_us(bases["float32"], adapter)
    prefix = "language_model."
    language_model = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    assert_merged_alike(language_model, expected, arrays(text))


def test_values_do_not_depend_on_the_region_that_is_read():
    rng = np.random.default_rng(0)
    shape, rank = (300, 3, 67), 37
    weight, left, right = (
        ArrayTensor(rng.normal(size=s).astype(np.float32))
        for s in (shape, (300, rank, 1), (rank, 3, 67))
    )
    merged = Merged("w", weight, left, right, 0.37)
    expected = read_whole(merged)
    exact = np.tensordot(left.array[..., 0].astype(float), right.array, 1) * 0.37 + weight.array
    np.testing.assert_allclose(expected, exact, rtol=0, atol=1e-5)
    for _ in range(100):
        bounds = [sorted(rng.integers(0, size + 1, 2)) for size in shape]
        region = tuple(slice(int(start), int(stop)) for start, stop in bounds)
        assert np.array_equal(merged.read(region), expected[region])


def test_float16_that_a_merge_would_overflow_is_named():
    weight = ArrayTensor(np.full((2, 2), 6e4, np.float16))
    ones = ArrayTensor(np.full((2, 2), 1e2, np.float32))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds values beyond float16's"):
        read_whole(Merged("lm_head.weight", weight, ones, ones, 1.0))


def test_an_adapter_is_a_source_to_convert(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["float32"], base)
    for name in ("tokenizer.json", "generation_config.json", "README.md"):
        (base / name).write_text('{"of": "base"}')
    adapter = saved_adapter(base, tmp_path / "adapter", **CONFIGS["whole modules"])
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (adapter / name).write_text('{"of": "adapter"}')
    assert adapter_base(epath.Path(adapter)) == str(base)
    assert adapter_base_revision(epath.Path(adapter)) is None
    source = open_source(adapter)
    assert {file.name: file.parent.name for file in source.files} == {
        "model.safetensors": "base",
        "adapter_config.json": "adapter",
        "adapter_model.safetensors": "adapter",
    }
    assert {file.name: file.parent.name for file in source.carried} == {
        "chat_template.jinja": "adapter",
        "generation_config.json": "base",
        "README.md": "base",
        "tokenizer.json": "adapter",
    }
    assert any(str(base) in note for note in source.notes)
    assert any("low-rank updates (scale 2)" in note for note in source.notes)
    assert any("multi_modal_projector.bias" in note for note in source.notes)
    convert(adapter, tmp_path / "out", to="hf")
    expected = values(source)
    found = arrays(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_everything_wrong_with_an_adapter_is_said_at_once(bases, tmp_path):
    adapter = saved_adapter(bases["float32"], tmp_path / "adapter", **CONFIGS["whole modules"])
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    layer = "base_model.model.model.language_model.layers.{}.self_attn.{}.weight"
    for number in (0, 2):
        for side in "AB":
            stored_tensor = tensors.pop(layer.format(number, f"q_proj.lora_{side}"))
            tensors[layer.format(number, f"query_proj.lora_{side}")] = stored_tensor
    del tensors[layer.format(3, "q_proj.lora_B")]
    tensors[layer.format(5, "q_proj.lora_A")] = torch.zeros(7, 24)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(69, 24)
    tensors["base_model.model.model.multi_modal_projector.bias"] = torch.zeros(24).double()
    del tensors["base_model.model.model.language_model.embed_tokens.weight"]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        open_lora(epath.Path(adapter), open_source(bases["float32"]))
    message = str(caught.value)
    for expected in (
        r"layers\.\{0,2\}\.self_attn\.query_proj\.weight: the base has no such tensor "
        r"\(nearest: .*layers\.\{\}\.self_attn\.q_proj\.weight\)",
        r"layers\.3\.self_attn\.q_proj\.lora_A\.weight: has no lora_B",
        r"layers\.5\.self_attn\.q_proj\.lora_A\.weight: found \(7, 24\), expected \(4, 24\)",
        r"lm_head\.weight: found \(69, 24\), expected \(61, 24\)",
        r"multi_modal_projector\.bias: dtype float64, expected float32",
        r"embed_tokens: named by modules_to_save, but the adapter holds nothing of it",
    ):
        assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: DoRA also rescales"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA': expected 'LORA'"),
        ({"lora_bias": True}, "lora_bias: "),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: the model has more layers"),
        ({"megatron_config": {"a": 1}}, "megatron_config: "),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4': .*begins by"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: "),
        ({"use_next_years_trick": 1}, "use_next_years_trick=1: unknown setting"),
        ({"r": 0}, "r=0: expected a positive integer"),
        ({"r": None}, "r=None: expected a positive integer"),
        ({"lora_alpha": "8"}, "lora_alpha='8': expected a number"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan: expected a number"),
        ({"rank_pattern": {"q_proj": -1}}, "q_proj=-1: expected a positive integer"),
        ({"alpha_pattern": {"q_proj(": 1}}, r"alpha_pattern: q_proj\(: not a regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': expected a list"),
        ({"rank_pattern": {"q_proj": 3}}, r"lora_B\.weight: found \(24, 4\), expected \(24, 3\)"),
    ],
)
def test_what_can_not_be_merged_exactly_is_refused(bases, plain_adapter, tmp_path, change, message):
    adapter = tmp_path / "adapter"
    shutil.copytree(plain_adapter, adapter)
    change_config(adapter, **change)
    with pytest.raises(CheckpointError, match=message):
        open_lora(epath.Path(adapter), open_source(bases["float32"]))


@pytest.fixture(scope="module")
def plain_adapter(bases, tmp_path_factory) -> Path:
    return saved_adapter(bases["float32"], tmp_path_factory.mktemp("adapter"), **CONFIGS["plain"])


def test_damaged_and_absent_files_are_named(bases, plain_adapter, tmp_path):
    base = open_source(bases["float32"])
    adapter = epath.Path(tmp_path / "adapter")
    shutil.copytree(plain_adapter, adapter)
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: truncated"):
        open_lora(adapter, base)
    safetensors.torch.save_file({}, weights)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_lora(adapter, base)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors or adapter_mod"):
        open_lora(adapter, base)
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not valid JSON"):
        open_lora(adapter, base)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: no such file"):
        open_lora(adapter, base)
