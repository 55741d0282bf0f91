"""transformers' model with every parameter random, for tests of checkpoints."""

import torch
from tiny_checkpoint import tiny_config
from transformers.models import mllama as hf

PATTERNS = {"periodic": (1, 4), "aperiodic": (0, 1, 4)}


def reference_model(
    cross_attention_layers: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> hf.MllamaForConditionalGeneration:
    """transformers' model with every parameter random, gates among them."""
    values = tiny_config(
        cross_attention_layers=cross_attention_layers, rope_scaling={"rope_type": "default"}
    ).to_dict()
    model = hf.MllamaForConditionalGeneration(hf.MllamaConfig.from_dict(values))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model.to(dtype)
