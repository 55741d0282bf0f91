"""Checkpoints in and out: Hugging Face folders to parameter trees and back."""

from mllama_jax.convert.load import load_params, load_pretrained
from mllama_jax.convert.reader import CheckpointError
from mllama_jax.convert.save import save_params

__all__ = ["CheckpointError", "load_params", "load_pretrained", "save_params"]
