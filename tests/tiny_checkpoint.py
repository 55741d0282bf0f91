"""Small models and checkpoints that the tests of loading and saving share."""

from pathlib import Path
from typing import Any

import flax.traverse_util
import ml_dtypes
import numpy as np
import safetensors.numpy

from mllama_jax import MllamaConfig
from mllama_jax.convert.table import COMPONENTS, Component, Config, tensors
from mllama_jax.pretrained import Params

TEXT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 42,
    "num_hidden_layers": 6,
    "cross_attention_layers": (1, 4),
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Two repeating units of self, cross, self."""

VISION = {
    "hidden_size": 30,
    "intermediate_size": 28,
    "num_hidden_layers": 5,
    "num_global_layers": 2,
    "intermediate_layers_indices": (0, 3),
    "vision_output_dim": 90,
    "num_attention_heads": 2,
    "image_size": 21,
    "patch_size": 7,
}


def tiny_config(**text: Any) -> MllamaConfig:
    """A whole model's configuration; `text` changes the decoder's."""
    return MllamaConfig(VISION, {**TEXT, **text}, image_token_index=61)


def part_config(config: MllamaConfig, component: Component) -> Config:
    """The configuration of the class that holds a component."""
    configs = (config, config.text_config, config.vision_config)
    return next(part for part in configs if type(part) is COMPONENTS[component].config)


def random_params(
    config: Config, component: Component = "model", dtype: Any = np.float32, seed: int = 0
) -> Params:
    """A component's parameters, every value of them random."""
    rng = np.random.default_rng(seed)
    shapes = {tensor.path: tensor.leaf_shape for tensor in tensors(config, component)}
    leaves = {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()}
    return flax.traverse_util.unflatten_dict(leaves)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes of every tensor in a folder, as the safetensors library
    reads them."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Name -> values of every tensor in a folder, in the Hub's order of axes."""
    dtypes = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    return {
        name: np.frombuffer(data, dtypes[dtype]).reshape(shape)
        for name, (dtype, shape, data) in stored(folder).items()
    }


def save_tensors(tensors: dict[str, np.ndarray], like: Path, folder: Path) -> None:
    """Writes a folder of these tensors with the configuration of another."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((like / "config.json").read_text())


def assert_equal_trees(found: Params, expected: Params) -> None:
    """Same names, dtypes, shapes and bits."""
    found, expected = map(flax.traverse_util.flatten_dict, (found, expected))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        assert found[path].shape == value.shape, path
        assert np.asarray(found[path]).tobytes() == np.asarray(value).tobytes(), path
