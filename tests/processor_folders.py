"""Folders with the released tokenizer, a chat template and settings for tiny tiles."""

import json
from pathlib import Path

from real_tokenizer import BOS, PAD, tokenizer_json

TILE = 28
TEMPLATE = (Path(__file__).parent / "llama_vision_template.jinja").read_text()

TOKENIZER_CONFIG = {
    "bos_token": BOS,
    "eos_token": "<|eot_id|>",
    "pad_token": PAD,
    "clean_up_tokenization_spaces": True,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 131072,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
IMAGE_CONFIG = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "MllamaImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_image_tiles": 4,
    "size": {"height": TILE, "width": TILE},
}


def write_folder(folder: Path) -> Path:
    """Writes what a released folder holds beside its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_CONFIG))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
