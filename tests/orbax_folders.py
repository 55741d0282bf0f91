"""Checkpoints of one small model that the tests of Orbax files share."""

from pathlib import Path

import ml_dtypes
import numpy as np
from tiny_checkpoint import random_params, tiny_config

from mllama_jax.convert import convert, save_params

CONFIG = tiny_config()
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def write_folders(path: Path) -> tuple[Path, Path]:
    """Hugging Face folders, and what they become as Orbax checkpoints, by the names of dtypes."""
    # Characters that mean something else in an address.
    hf, orbax = path / "hf", path / "100% ours #1"
    for name, dtype in DTYPES.items():
        params = random_params(CONFIG, dtype=dtype)
        save_params(params, CONFIG, hf / name, "model", max_shard_size="99KB")
        (hf / name / "tokenizer.json").write_text("{}")
        convert(hf / name, orbax / name, to="orbax")
    return hf, orbax
