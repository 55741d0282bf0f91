"""The tokenizer of the released models, built from the vocabulary that Meta's package ships."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

BOS = "<|begin_of_text|>"
IMAGE = "<|image|>"
PAD = "<|finetune_right_pad_id|>"

SPECIAL_TOKENS = (
    BOS,
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PAD,
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
    IMAGE,
)
"""From id 128000 on."""


@cache
def tokenizer_json() -> str:
    """The contents of a tokenizer.json; building it takes some seconds."""
    [folder] = find_spec("llama_models").submodule_search_locations
    model = Path(folder) / "llama3" / "tokenizer.model"
    converter = TikTokenConverter(str(model), additional_special_tokens=list(SPECIAL_TOKENS))
    return converter.converted().to_str()


def real_backend() -> Tokenizer:
    """A tokenizer of its own for each caller."""
    return Tokenizer.from_str(tokenizer_json())
