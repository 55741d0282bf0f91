"""Builds the untrained model: a tiny Mllama with its own tokenizer, as a Hugging Face folder.

    python examples/digits/make_model.py                # runs/digits/start

The same command always builds the same model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
import tyro
from pictures import TILE
from tokenizers import decoders, models, pre_tokenizers, trainers

from mllama_jax import MllamaConfig, MllamaForConditionalGeneration

IMAGE_TOKEN = "<|image|>"
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
ORDINARY_TOKENS = 440
"""256 bytes and the commonest pieces of the questions."""

# How Llama 3 cuts text into pieces before merging bytes; numbers stay apart digit by digit.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Options:
    """Where the questions are, and where the model goes."""

    data: Path = Path("runs/digits/data/train.jsonl")
    """Conversations that the tokenizer learns its pieces from."""
    output: Path = Path("runs/digits/start")
    gate: float = 0.5
    """Where every gate starts. A model that learns everything from nothing has no use for gates
    at 0, which are there to leave a trained language model undisturbed."""
    seed: int = 0


def make_model(options: Options) -> None:
    """Writes weights, configuration, tokenizer, chat template and image processor settings."""
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts(options.data))
    ids = {token: tokenizer.token_to_id(token) for token in (*SPECIAL_TOKENS, IMAGE_TOKEN)}
    config = model_config(ids)
    model = MllamaForConditionalGeneration(config)
    params = set_gates(model.init_params(jax.random.key(options.seed)), options.gate)
    model.save_pretrained(params, options.output)
    tokenizer.save(str(options.output / "tokenizer.json"))
    write_json(options.output / "tokenizer_config.json", tokenizer_settings(tokenizer))
    write_json(options.output / "special_tokens_map.json", special_tokens_map())
    write_json(options.output / "preprocessor_config.json", image_settings())
    write_json(options.output / "generation_config.json", generation_settings(ids))
    template = (Path(__file__).parent / "chat_template.jinja").read_text()
    (options.output / "chat_template.jinja").write_text(template)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} parameters, {config.text_config.vocab_size} tokens: {options.output}")


def texts(data: Path) -> Iterator[str]:
    """Every text of the conversations."""
    for line in data.read_text().splitlines():
        for message in json.loads(line)["messages"]:
            content = message["content"]
            if isinstance(content, str):
                yield content
            else:
                yield from (part["text"] for part in content if part["type"] == "text")


def train_tokenizer(corpus: Iterator[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE, so that any text can be encoded; special tokens come behind the pieces.

    The image token is the last: the first id that has an embedding but no logit.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ORDINARY_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ("system", "user", "assistant", "\n\n")
    tokenizer.train_from_iterator([*corpus, *roles * 100], trainer)
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, IMAGE_TOKEN])
    return tokenizer


def model_config(ids: dict[str, int]) -> MllamaConfig:
    """About a million parameters, with every part of the released models in small."""
    text = {
        "vocab_size": ids[IMAGE_TOKEN],
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "cross_attention_layers": [1, 4],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        "max_position_embeddings": 4096,
        "initializer_range": 0.08,
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]],
        "pad_token_id": ids["<|finetune_right_pad_id|>"],
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "intermediate_layers_indices": [1, 2],
        "vision_output_dim": 64 * 3,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": TILE // 4,
        "initializer_range": 0.08,
    }
    return MllamaConfig(vision, text, image_token_index=ids[IMAGE_TOKEN])


def set_gates(params: dict, value: float) -> dict:
    """Every gate of both towers at `value`."""

    def start(path: tuple, leaf: jax.Array) -> jax.Array:
        return jnp.full_like(leaf, value) if "gate" in path[-1].key.split("_") else leaf

    return jax.tree.map_with_path(start, params)


def tokenizer_settings(tokenizer: tokenizers.Tokenizer) -> dict:
    """tokenizer_config.json."""
    added = {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "added_tokens_decoder": added,
        **special_tokens_map(),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "processor_class": "MllamaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def special_tokens_map() -> dict[str, str]:
    """special_tokens_map.json."""
    return {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }


def image_settings() -> dict:
    """preprocessor_config.json."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "MllamaImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_tiles": 4,
        "processor_class": "MllamaProcessor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": TILE, "width": TILE},
    }


def generation_settings(ids: dict[str, int]) -> dict:
    """generation_config.json: greedy, short answers."""
    return {
        "bos_token_id": ids["<|begin_of_text|>"],
        "do_sample": False,
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]],
        "max_new_tokens": 16,
        "pad_token_id": ids["<|finetune_right_pad_id|>"],
    }


def write_json(file: Path, values: dict) -> None:
    """Writes readable JSON."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    make_model(tyro.cli(Options, description=__doc__))
