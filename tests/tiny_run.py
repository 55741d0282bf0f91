"""What a training run of seconds needs: a tiny model folder and a few conversations."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import mllama_jax as mj

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
TILE = 12


def write_start(folder: Path) -> None:
    """The example's tokenizer and template around a model of a few thousand parameters."""
    write_processor(folder)
    model = mj.MllamaForConditionalGeneration(tiny_config())
    model.save_pretrained(model.init_params(jax.random.key(0)), folder)


def write_processor(folder: Path) -> None:
    """The example's tokenizer and template, with small tiles."""
    folder.mkdir()
    for name in (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("chat_template.jinja", "generation_config.json"),
    ):
        shutil.copy(EXAMPLE / "model" / name, folder / name)
    image_settings = json.loads((EXAMPLE / "model" / "preprocessor_config.json").read_text())
    image_settings["size"] = {"height": TILE, "width": TILE}
    (folder / "preprocessor_config.json").write_text(json.dumps(image_settings))


def tiny_config() -> mj.MllamaConfig:
    """Of a model for this tokenizer and these tiles."""
    example = mj.MllamaConfig.from_pretrained(EXAMPLE / "model")
    text = {
        **example.text_config.to_dict(),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "cross_attention_layers": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": 4,
    }
    return mj.MllamaConfig(vision, text, image_token_index=example.image_token_id)


def write_records(file: Path, count: int = 24, text_only: bool = True) -> None:
    """Conversations about a picture of one or two tiles; with `text_only` every fourth has none."""
    rng = np.random.default_rng(0)
    with file.open("w") as out:
        for number in range(count):
            content: Any = f"Is {number} even or odd?"
            if number % 4 or not text_only:
                picture = file.parent / f"{number}.png"
                pixels = rng.integers(0, 256, (TILE, TILE * (1 + number % 2), 3), np.uint8)
                Image.fromarray(pixels).save(picture)
                content = [
                    {"type": "image", "image": picture.name},
                    {"type": "text", "text": "Even or odd?"},
                ]
            answer = f"It is {'odd' if number % 2 else 'even'}."
            messages = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ]
            kind = "text only" if isinstance(content, str) else "seen"
            out.write(json.dumps({"kind": kind, "messages": messages}) + "\n")


def kept(folder: Path) -> dict[str, str]:
    """The environment of processes that compile nothing which another of them has compiled."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def metrics(folder: Path) -> list[dict]:
    """What a run has written of its steps and evaluations."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(folder: Path, whole: Path) -> None:
    """Bit for bit the same numbers of every step, and the same weights."""
    assert metrics(folder) == metrics(whole)
    weights = Path("model") / "model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
