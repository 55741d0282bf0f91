"""Llama 3.2 Vision (Hugging Face: Mllama) in JAX and Flax.

The public names load on first use, so that ``import mllama_jax`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mllama_jax.cache import MllamaCache as MllamaCache
    from mllama_jax.configs import MllamaConfig as MllamaConfig
    from mllama_jax.configs import MllamaTextConfig as MllamaTextConfig
    from mllama_jax.configs import MllamaVisionConfig as MllamaVisionConfig
    from mllama_jax.generation.config import GenerationConfig as GenerationConfig
    from mllama_jax.model import (
        MllamaForConditionalGeneration as MllamaForConditionalGeneration,
    )
    from mllama_jax.processing.image_processor import MllamaImageProcessor as MllamaImageProcessor
    from mllama_jax.processing.processor import MllamaProcessor as MllamaProcessor
    from mllama_jax.processing.tokenizer import MllamaTokenizer as MllamaTokenizer
    from mllama_jax.text import MllamaForCausalLM as MllamaForCausalLM
    from mllama_jax.text import MllamaTextModel as MllamaTextModel
    from mllama_jax.vision import MllamaVisionModel as MllamaVisionModel

_MODULES = {
    "GenerationConfig": "generation.config",
    "MllamaCache": "cache",
    "MllamaConfig": "configs",
    "MllamaForCausalLM": "text",
    "MllamaForConditionalGeneration": "model",
    "MllamaImageProcessor": "processing.image_processor",
    "MllamaProcessor": "processing.processor",
    "MllamaTextConfig": "configs",
    "MllamaTextModel": "text",
    "MllamaTokenizer": "processing.tokenizer",
    "MllamaVisionConfig": "configs",
    "MllamaVisionModel": "vision",
}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
