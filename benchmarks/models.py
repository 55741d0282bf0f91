"""The model that all sides of a comparison load: the released one's shape in small.

    python benchmarks/models.py                # ~/.cache/mllama_jax/benchmarks/small

130 million parameters with the real vocabulary of 128,256 tokens, the released tokenizer and chat
template, and weights drawn at random from a fixed seed: large enough that no layer is switched off
and that greedy text does not fall into a loop. As in the released checkpoints, embeddings of
missing tiles are zero.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from mllama_jax import MllamaConfig, MllamaForConditionalGeneration
from mllama_jax.convert.table import tensors

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mllama_jax/benchmarks"

END_TOKENS = (128001, 128008, 128009)
CONFIG: dict[str, Any] = {
    "text_config": {
        "vocab_size": 128256,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 15,
        "cross_attention_layers": [3, 8, 13],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": list(END_TOKENS),
        "pad_token_id": 128004,
    },
    "vision_config": {
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_hidden_layers": 6,
        "num_global_layers": 2,
        "num_attention_heads": 5,
        "intermediate_layers_indices": [1, 3, 4],
        "vision_output_dim": 320 * 4,
        "image_size": 224,
        "patch_size": 14,
    },
}


def model_folder(cache: Path = CACHE) -> Path:
    """The Hugging Face folder of the model, made if it is not there yet."""
    folder = cache / "small"
    if not (folder / "config.json").exists():
        _write(folder)
    return folder


def _write(folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from processor_folders import IMAGE_CONFIG, write_folder

    size = CONFIG["vision_config"]["image_size"]
    write_folder(folder)
    images = {**IMAGE_CONFIG, "size": {"height": size, "width": size}}
    generation = {"bos_token_id": 128000, "eos_token_id": END_TOKENS, "pad_token_id": 128004}
    _write_json(folder / "preprocessor_config.json", images)
    _write_json(folder / "generation_config.json", {**generation, "do_sample": False})
    config = MllamaConfig(**CONFIG)
    MllamaForConditionalGeneration(config).save_pretrained(random_params(config), folder)


def random_params(config: MllamaConfig, seed: int = 0) -> dict[str, Any]:
    """Weights that keep the size of what they multiply, gates that are half open or more."""
    rng = np.random.default_rng(seed)
    leaves = {
        tensor.path: _draw(rng, "/".join(tensor.path), tensor.leaf_shape)
        for tensor in tensors(config, "model")
    }
    params = flax.traverse_util.unflatten_dict(leaves)
    _forget_missing_tiles(config, params["vision_model"])
    return params


def _forget_missing_tiles(config: MllamaConfig, vision: dict[str, Any]) -> None:
    """Embeddings of tiles that a picture does not have are zero, as in released checkpoints."""
    for module, name in (
        ("gated_positional_embedding", "tile_embedding"),
        ("pre_tile_positional_embedding", "embedding"),
        ("post_tile_positional_embedding", "embedding"),
    ):
        table = vision[module][name]
        table[0] = 0
        for ratio, (height, width) in enumerate(config.vision_config.supported_aspect_ratios, 1):
            table[ratio, height * width :] = 0


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    if "gate" in name and "gate_proj" not in name:
        return np.sign(values) * (0.6 + 0.4 * np.abs(values))
    if name.endswith("scale"):
        return 1 + 0.1 * values
    if name.endswith("bias"):
        return 0.1 * values
    if not name.endswith("kernel"):
        return values
    inputs = {"o_proj": slice(-3, -1), "patch_embedding": slice(0, -1)}
    inputs |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), slice(-3, -2))
    found = next((axes for part, axes in inputs.items() if part in name), slice(-2, -1))
    return values * np.float32(np.prod(shape[found]) ** -0.5)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    print(model_folder(parser.parse_args().cache))


if __name__ == "__main__":
    main()
