"""A tokenizer's files in a Hugging Face folder, and the special tokens that they declare."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from tokenizers import AddedToken, Tokenizer

from mllama_jax.processing.chat_template import (
    TEMPLATE_FILES,
    ChatTemplates,
    read_chat_templates,
    write_chat_templates,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    *TEMPLATE_FILES,
)

NamedTokens = dict[str, str | list[str]]
"""Special tokens by what they are for: `bos_token`, …, `additional_special_tokens` (several)."""

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_RULES = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
_MORE = "additional_special_tokens"
_EXTRA = "extra_special_tokens"
# A path on the machine of whoever saved the files.
_PRIVATE = ("name_or_path", "tokenizer_file", "special_tokens_map_file")


def read_tokenizer_files(folder: epath.Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a folder and its configuration (arguments of `MllamaTokenizer`).

    Raises:
        FileNotFoundError: no tokenizer.json.
        ValueError: a file that is not what it should be.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{os.fspath(folder)!r} has no tokenizer.json. Expected the folder of a Hugging Face "
            "checkpoint; Meta's tokenizer.model has to be converted first."
        )
    try:
        backend = Tokenizer.from_str(file.read_text())
    except Exception as error:  # The library raises nothing more precise.
        raise ValueError(f"{os.fspath(file)!r} is no tokenizer file: {error}") from error
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        # Folders of that age declare the tokens in a file of their own.
        config |= _read_special_tokens_map(folder, config)
    templates = read_chat_templates(folder)
    if templates is not None:
        config["chat_template"] = templates
    return backend, {name: value for name, value in config.items() if name not in _PRIVATE}


def write_tokenizer_files(
    path: str | os.PathLike,
    backend: Tokenizer,
    named: NamedTokens,
    config: Mapping[str, Any],
    chat_template: ChatTemplates | None,
) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat templates."""
    folder = epath.Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **config,
        **named,
        _EXTRA: {name: token for name, token in named.items() if name not in (*_NAMES, _MORE)},
        "added_tokens_decoder": {
            str(id): dict(zip(_RULES, _rules(token), strict=True))
            for id, token in sorted(backend.get_added_tokens_decoder().items())
        },
    }
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", fields)
    write_json(folder / "special_tokens_map.json", named)
    write_chat_templates(folder, chat_template)


def split_config(
    config: Mapping[str, Any], extra: Mapping[str, Any] | Sequence[Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The named special tokens of a configuration, as declared there, and everything else in it.

    Args:
        config: fields of tokenizer_config.json.
        extra: its `extra_special_tokens`: more names, or (newer files) more tokens without a name.
    """
    more_names = extra if isinstance(extra, Mapping) else {}
    unnamed = [*(config.get(_MORE) or []), *(extra if isinstance(extra, list | tuple) else [])]
    declared = {name: config.get(name) for name in _NAMES} | {_MORE: unnamed, **more_names}
    rest = {name: value for name, value in config.items() if name not in declared}
    return {name: value for name, value in declared.items() if value}, rest


def spellings(declared: Mapping[str, Any]) -> NamedTokens:
    """The text of each named token, or of each in a list of them."""
    return {
        name: [str(_token(t)) for t in value] if isinstance(value, list) else str(_token(value))
        for name, value in declared.items()
    }


def add_tokens(
    backend: Tokenizer, named: Mapping[str, Any], by_id: Mapping[str | int, Any]
) -> None:
    """Teaches `backend` the special tokens that it lacks, or matches by other rules.

    Args:
        named: by `split_config`.
        by_id: `added_tokens_decoder` of tokenizer_config.json.

    Raises:
        ValueError: tokens whose declared id is not the one they get.

    Source: transformers 4.54.1, tokenization_utils_fast.py: PreTrainedTokenizerFast.
    """
    names = [_token(t) for v in named.values() for t in (v if isinstance(v, list) else [v])]
    special = set(map(str, names))
    declared = {int(id): _token(token) for id, token in by_id.items()}
    there = {_rules(token) for token in backend.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(declared.items()) if _rules(token) not in there]
    spelled = {rules[0] for rules in there} | set(map(str, new))
    new += [token for token in names if str(token) not in spelled]
    for token in new:
        token.special = token.special or str(token) in special
    backend.add_tokens(new)
    found = {id: backend.token_to_id(str(token)) for id, token in declared.items()}
    wrong = [f"{declared[id]!s}: {id}, in fact {is_}" for id, is_ in found.items() if id != is_]
    if wrong:
        raise ValueError(
            "tokenizer_config.json declares tokens under other ids than they have in "
            f"tokenizer.json: {'; '.join(wrong)}. The two files don't belong together."
        )


def _token(declared: Any) -> AddedToken:
    """A token from how files spell it: text, or a mapping with `content` and rules."""
    if isinstance(declared, AddedToken):
        return declared
    if isinstance(declared, str):
        return AddedToken(declared, special=True)
    if isinstance(declared, Mapping) and isinstance(declared.get("content"), str):
        rules = {name: bool(declared[name]) for name in _RULES[1:] if name in declared}
        return AddedToken(declared["content"], **rules)
    raise ValueError(f"A special token is declared as {declared!r}; expected text.")


def _rules(token: AddedToken) -> tuple[str | bool, ...]:
    return tuple(getattr(token, name) for name in _RULES)


def _read_special_tokens_map(folder: epath.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    declared = read_json(folder / "special_tokens_map.json")
    more = [*(config.get(_MORE) or []), *(declared.get(_MORE) or [])]
    if more:
        declared[_MORE] = [token for i, token in enumerate(more) if token not in more[:i]]
    return declared


def read_json(file: epath.Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{os.fspath(file)!r} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{os.fspath(file)!r} holds a {type(content).__name__}; expected a JSON object."
        )
    return content


def write_json(file: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
