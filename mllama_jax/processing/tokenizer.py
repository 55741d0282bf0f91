"""Text to token ids and back: a thin layer over the `tokenizers` library."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from mllama_jax.hub import local_folder
from mllama_jax.processing.batch_feature import BatchFeature
from mllama_jax.processing.chat_template import templates_by_name
from mllama_jax.processing.padding import NO_LIMIT, Lengths, as_arrays, as_ids, check_side
from mllama_jax.processing.special_tokens import SpecialTokenEscape
from mllama_jax.processing.tokenizer_files import (
    TOKENIZER_FILES,
    add_tokens,
    read_tokenizer_files,
    spellings,
    split_config,
    write_tokenizer_files,
)

_IMAGE_TOKEN = "<|image|>"
# Spaces that a word-level decoder leaves before punctuation.
_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class MllamaTokenizer:
    """What encodes and decodes text, read from a Hugging Face folder.

    Gives the ids, masks and texts of transformers' `PreTrainedTokenizerFast` on the same files,
    and adds one thing: text that went through `escape_special_tokens` (as `apply_chat_template`
    does with what users wrote) is encoded as ordinary text, special tokens spelled in it
    included. Never returns `token_type_ids`, which Mllama has no use for.

    Args:
        backend: the `tokenizers` object; taken over, so don't use it for anything else.
        bos_token, eos_token, unk_token, pad_token, additional_special_tokens, …: the named special
            tokens, as text or as the mapping that tokenizer_config.json holds. One that the
            backend lacks is added to it.
        extra_special_tokens: more named tokens, `{"image_token": "<|image|>"}`.
        padding_side, truncation_side: "right" or "left".
        model_max_length: what `truncation=True` and `padding="max_length"` use without a length.
        clean_up_tokenization_spaces: default of `decode`.
        split_special_tokens: default of `__call__`: encode special tokens as text.
        chat_template: a Jinja template, or several by name (a mapping, or the list of
            `{"name", "template"}` of tokenizer_config.json).
        config: any other field of tokenizer_config.json; kept for `save_pretrained`.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        model_max_length: int | None = None,
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        added_tokens_decoder: Mapping[str | int, Any] | None = None,
        extra_special_tokens: Mapping[str, Any] | Sequence[Any] | None = None,
        chat_template: str | Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        model_input_names: Sequence[str] = ("input_ids", "attention_mask"),
        **config: Any,
    ):
        self.backend = backend
        stored_padding = backend.padding or {}
        stored_truncation = backend.truncation or {}
        self.padding_side = check_side(
            padding_side or stored_padding.get("direction", "right").lower()
        )
        self.truncation_side = check_side(
            truncation_side or stored_truncation.get("direction", "right").lower()
        )
        backend.no_padding()
        backend.no_truncation()
        self.model_max_length = NO_LIMIT if model_max_length is None else model_max_length
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens
        self.model_input_names = [n for n in model_input_names if n != "token_type_ids"]
        self.chat_template = templates_by_name(chat_template)
        if "pad_token" in stored_padding:
            config.setdefault("pad_token", stored_padding["pad_token"])
        declared, self._config = split_config(config, extra_special_tokens)
        add_tokens(backend, declared, added_tokens_decoder or {})
        self._named = spellings(declared)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, revision: str | None = None, **overrides: Any
    ) -> "MllamaTokenizer":
        """Reads tokenizer.json, tokenizer_config.json and special_tokens_map.json.

        Args:
            path: a folder, local or in the cloud, or a hub id.
            revision: branch, tag or commit of a hub id.
            overrides: constructor arguments that replace those of the files.

        Raises:
            FileNotFoundError: no folder, or no tokenizer.json in it.
            ValueError: a file that can't be read as what it should be.
        """
        folder = local_folder(path, allow_patterns=TOKENIZER_FILES, revision=revision)
        backend, config = read_tokenizer_files(folder)
        return cls(backend, **(config | overrides))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes a folder that `from_pretrained`, here and in transformers, reads back."""
        config = self._config | {
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_max_length": self.model_max_length,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "split_special_tokens": self.split_special_tokens,
            "model_input_names": self.model_input_names,
        }
        write_tokenizer_files(folder, self.backend, self._named, config, self.chat_template)

    # Special tokens

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """The named special tokens; chat templates get these as variables."""
        return dict(self._named)

    @property
    def all_special_tokens(self) -> list[str]:
        """The named special tokens, each once."""
        tokens: list[str] = []
        for token in self.special_tokens_map.values():
            tokens += token if isinstance(token, list) else [token]
        return list(dict.fromkeys(tokens))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def bos_token(self) -> str | None:
        return self._name("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token(self) -> str | None:
        return self._name("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    @property
    def pad_token(self) -> str | None:
        return self._name("pad_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id(self.pad_token)

    @property
    def unk_token(self) -> str | None:
        return self._name("unk_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id(self.unk_token)

    @property
    def image_token(self) -> str | None:
        """The token that stands for an image: as named in the files, else `<|image|>`, if known."""
        named = self._name("image_token")
        known = self.backend.token_to_id(_IMAGE_TOKEN) is not None
        return named or (_IMAGE_TOKEN if known else None)

    @property
    def image_token_id(self) -> int | None:
        return self._id(self.image_token)

    def _name(self, name: str) -> str | None:
        token = self._named.get(name)
        return token if isinstance(token, str) else None

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def escape_special_tokens(self, text: str) -> str:
        """`text` so that special tokens spelled in it are encoded as ordinary text.

        For text from outside that becomes part of a raw prompt:
        `f"<|image|>{tokenizer.escape_special_tokens(question)}"`. The escape is invisible: see
        `mllama_jax.processing.special_tokens`. `apply_chat_template` does this by itself.
        """
        return self.escape.escape(text)

    def unescape_special_tokens(self, text: str) -> str:
        """The text that `escape_special_tokens` was given."""
        return self.escape.unescape(text)

    @cached_property
    def escape(self) -> SpecialTokenEscape:
        """The escape of everything that encoding would take for a special token."""
        added = self.backend.get_added_tokens_decoder().values()
        special = [str(token) for token in added if token.special]
        return SpecialTokenEscape(tuple(dict.fromkeys(self.all_special_tokens + special)))

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or a list of several ids; unknown ones get the unknown token's."""
        if isinstance(tokens, str):
            found = self.backend.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int] | np.ndarray, skip_special_tokens: bool = False
    ) -> Any:
        """The token of an id, or the tokens of several; None where there is none."""
        if np.ndim(ids) == 0:
            return self.backend.id_to_token(int(ids))  # type: ignore[arg-type]
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend.id_to_token(id) for id in as_ids(ids) if id not in skipped]

    # Encoding

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str | None = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        split_special_tokens: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Encodes a text or a batch of texts.

        Args:
            text: special tokens in it are parsed, unless they went through
                `escape_special_tokens`.
            add_special_tokens: add what the tokenizer's own template adds (for Llama 3: nothing).
            padding: True or "longest": to the longest of the batch; "max_length": to `max_length`;
                "left" or "right": to the longest, on that side; False: not.
            truncation: True: to `max_length`, or the tokenizer's limit; False: not. None: only if
                a `max_length` is given and `padding` is False.
            max_length: tokens, special ones included.
            pad_to_multiple_of: rounds the padded length up.
            padding_side: "left" or "right"; None: the tokenizer's own.
            return_attention_mask: None: if the tokenizer's files say so (for Llama 3: yes).
            split_special_tokens: encode special tokens as ordinary text; None: the tokenizer's own.
            return_tensors: None (lists), "np" (int64) or "jax" (int32).

        Returns:
            input_ids and attention_mask: (B, T), or (T,) as lists for one text.

        Raises:
            TypeError: `text` is neither a string nor a list of strings.
            ValueError: an option has no such value; padding without a padding token; arrays asked
                for from rows of different length.
        """
        one = isinstance(text, str)
        texts = check_texts(text)
        lengths = Lengths.from_options(
            padding,
            truncation,
            max_length,
            pad_to_multiple_of,
            padding_side,
            default_side=self.padding_side,
            limit=self.model_max_length,
        )
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        ids = self._ids(texts, add_special_tokens, split_special_tokens, lengths.cut_to)
        rows, masks = lengths.pad(ids, self.pad_token_id)
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        fields = {"input_ids": rows} | ({"attention_mask": masks} if return_attention_mask else {})
        if return_tensors is None and one:
            return BatchFeature({name: values[0] for name, values in fields.items()})
        return as_arrays(fields, return_tensors)

    def encode(self, text: str, **options: Any) -> list[int]:
        """The ids of one text; options as in a call."""
        return self(text, **options)["input_ids"]

    def _ids(
        self, texts: Sequence[str], add_special_tokens: bool, split: bool, limit: int | None
    ) -> list[list[int]]:
        if split:
            plain = [self.escape.unescape(text) for text in texts]
            encodings = self._plain.encode_batch(plain, add_special_tokens=False)
        else:
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
            for i, text in enumerate(texts):
                if self.escape.is_escaped(text):
                    encodings[i] = self._encode_escaped(text, encodings[i])
        added = self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        if limit is not None:
            if limit < added:
                raise ValueError(
                    f"max_length={limit} leaves no room: the tokenizer adds {added} special tokens."
                )
            for encoding in encodings:
                encoding.truncate(limit - added, direction=self.truncation_side)
        if added:
            encodings = [self.backend.post_process(e, None, True) for e in encodings]
        return [encoding.ids for encoding in encodings]

    def _encode_escaped(self, text: str, found: Encoding) -> Encoding:
        """Encodes escaped text, given its encoding with the marks in it (`found`).

        The special tokens in `found` are the real ones, since no escaped spelling is matched. What
        stands between two of them is one run of ordinary text, encoded in one piece: words are
        then split as they are in text that never held a mark.
        """
        pieces = []
        end = 0
        for id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if self._is_real(id, text[start:stop]):
                pieces += [self._encode_plain(text[end:start]), self._encode_one(text[start:stop])]
                end = stop
        pieces.append(self._encode_plain(text[end:]))
        return Encoding.merge(pieces, growing_offsets=True)

    def _is_real(self, id: int, text: str) -> bool:
        """Whether a token of escaped text is a special token that stands there unescaped."""
        if id == self.unk_token_id and str(self.unk_token) not in text:
            return False  # It stands for a word that the vocabulary lacks.
        # A normalizer may drop the mark before tokens are matched; that's no real token then.
        return id in self._special_ids and not self.escape.is_escaped(text)

    def _encode_one(self, token: str) -> Encoding:
        return self.backend.encode(token, add_special_tokens=False)

    def _encode_plain(self, text: str) -> Encoding:
        """The encoding of a run of ordinary text, its marks taken out."""
        encoding = self._plain.encode(self.escape.unescape(text), add_special_tokens=False)
        special = (self._special_ids - {self.unk_token_id}).intersection(encoding.ids)
        if special:
            tokens = [self.backend.id_to_token(id) for id in sorted(special)]
            raise ValueError(
                f"This tokenizer can't write {tokens} as ordinary text: its vocabulary has the "
                "whole word. Take it out of the text, or pass allow_special_tokens=True."
            )
        return encoding

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        ids = map(self.backend.token_to_id, self.escape.tokens)
        return frozenset(id for id in ids if id is not None)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer, blind to special tokens.

        A copy, not the switch on `backend`, because other threads may be encoding with that.
        """
        plain = copy.deepcopy(self.backend)
        for token in plain.get_added_tokens_decoder().values():
            if not token.special and str(token) in self.escape.tokens:
                token.special = True
                plain.add_special_tokens([token])
        plain.encode_special_tokens = True
        return plain

    # Decoding

    def decode(
        self,
        token_ids: int | Sequence[int] | np.ndarray,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of one sequence of ids.

        Special tokens that were encoded as text are text, and are kept by `skip_special_tokens`;
        without it, the two can no longer be told apart in the result.

        Args:
            token_ids: (T,), of numpy, JAX or plain Python.
            skip_special_tokens: leave out special tokens.
            clean_up_tokenization_spaces: drop spaces before punctuation and English contractions;
                None: the tokenizer's own (see its file).
        """
        ids = as_ids(np.atleast_1d(token_ids))
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            for spaced in _CLEAN_UP:
                text = text.replace(spaced, spaced.strip())
        return text

    def batch_decode(
        self, sequences: Iterable[Any], skip_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The texts of several sequences of ids; see `decode`."""
        if hasattr(sequences, "__array__"):
            sequences = np.asarray(sequences)  # From a device in one piece, not row by row.
        return [self.decode(row, skip_special_tokens, **options) for row in sequences]

    def __getstate__(self) -> dict[str, Any]:
        # The blind copy is made again where it is needed.
        return {name: value for name, value in vars(self).items() if name != "_plain"}


def check_texts(text: Any) -> list[str]:
    """A batch of texts from a text or a batch of texts.

    Raises:
        TypeError: anything else.
    """
    if isinstance(text, str):
        return [text]
    if not isinstance(text, list | tuple):
        raise TypeError(f"text is a {type(text).__name__}; expected a string or a list of strings.")
    wrong = [f"text[{i}] is a {type(t).__name__}" for i, t in enumerate(text) if type(t) is not str]
    if wrong:
        raise TypeError(f"{'; '.join(wrong)}; expected strings.")
    return list(text)
