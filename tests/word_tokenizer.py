"""A tokenizer with words for tokens: quick to build, change and write."""

from tokenizers import Tokenizer, models, pre_tokenizers

from mllama_jax import MllamaTokenizer


def word_tokenizer(**config) -> MllamaTokenizer:
    """One word, one token."""
    words = ["[UNK]", "a", "b", "c", "<", "s", ">", "pad"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]
    )
    config = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "[UNK]"} | config
    return MllamaTokenizer(backend, **config)
