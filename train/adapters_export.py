"""What a run leaves: its adapters as PEFT loads them, and a whole model with them merged in."""

import json
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from mllama_jax.convert.table import LAYOUTS, Tensor, tensors
from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.train.components import component_of, is_adapter
from mllama_jax.train.lora import merged
from mllama_jax.train.metrics import replace_text
from mllama_jax.train.settings import LoraConfig, ModelConfig

# Of the model as transformers builds it, which is what PEFT is told of.
_LAYOUT = LAYOUTS["transformers 4.52 and later, in memory"]


def only_adapters(trained: Params) -> bool:
    """Whether adapters are all that is trained, so that they alone are the run's result."""
    return all(map(is_adapter, flax.traverse_util.flatten_dict(trained)))


def trained_beside_adapters(model: PretrainedModule, trained: Params) -> list[str]:
    """Components that are trained as a whole in a run with adapters; none in a run without."""
    paths = [*flax.traverse_util.flatten_dict(trained)]
    if not any(map(is_adapter, paths)):
        return []
    return sorted({component_of(model, path) for path in paths if not is_adapter(path)})


def save_adapters(
    folder: epath.PathLike,
    model: MllamaForConditionalGeneration,
    adapters: Params,
    config: LoraConfig,
    base: str,
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT loads onto the base.

    Every process of a job calls this, and the first one writes. The configuration comes last:
    without it there is no adapter.

    Args:
        folder: local or cloud; made if absent.
        adapters: and nothing else.
        config: theirs.
        base: path or hub id of the model that they were trained on.
    """
    leaves = {path: _whole(leaf) for path, leaf in _flat(adapters).items()}
    if jax.process_index() != 0:
        return
    found: dict[str, np.ndarray] = {}
    modules = []
    for tensor in tensors(model.full_config, "model"):
        *projection, name = tensor.path
        if name != "kernel" or (*projection, "a") not in leaves:
            continue
        module = _module_name(tensor)
        a, b = (leaves[*projection, side] for side in "ab")
        if tensor.index is not None:
            a, b = a[tensor.index], b[tensor.index]
        modules.append(module)
        for side, weight in zip("AB", _of_peft(a, b, tensor), strict=True):
            found[f"base_model.model.{module}.lora_{side}.weight"] = np.ascontiguousarray(weight)
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "adapter_model.safetensors"
    unfinished = folder / f".{file.name}.incomplete"
    unfinished.write_bytes(safetensors.numpy.save(found, metadata={"format": "pt"}))
    unfinished.replace(file)
    settings = _peft_settings(modules, config, base)
    replace_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")


def _peft_settings(modules: list[str], config: LoraConfig, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Whole names: a name's end, such as fc1, is that of modules without an adapter, too.
        "target_modules": modules,
    }


def _module_name(tensor: Tensor) -> str:
    hub, theirs = next(pair for pair in _LAYOUT if tensor.hub.startswith(pair[0]))
    return (theirs + tensor.hub.removeprefix(hub)).removesuffix(".weight")


def _of_peft(a: np.ndarray, b: np.ndarray, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """lora_A (rank, inputs) and lora_B (outputs, rank), or a convolution's."""
    rank = len(b)
    if len(tensor.hub_shape) == 4:  # of patches: h, w, C and the rank
        return a.transpose(3, 2, 0, 1), b.T[:, :, None, None]
    return a.reshape(-1, rank).T, b.reshape(rank, -1).T


def _whole(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def finished(
    model: MllamaForConditionalGeneration,
    frozen: Params,
    trained: Params,
    config: LoraConfig,
    base: ModelConfig,
) -> tuple[MllamaForConditionalGeneration, Params]:
    """A model, not quantised, and its whole parameters: what a run hands over.

    Where the run's base is quantised, the base's own weights are read again, into the host's
    memory: the device may have no room for them.
    """
    if model.quantise is None:
        return model, jax.jit(merged, static_argnames="config")(frozen, trained, config=config)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        exact, params = MllamaForConditionalGeneration.from_pretrained(
            base.path, dtype=base.dtype, param_dtype=base.param_dtype
        )
        return exact, merged(params, jax.device_get(trained), config)


def _flat(tree: Params) -> dict[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(tree)
