"""The options of a processor's call: which are for images, which for text, which for both."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from mllama_jax.processing.image_processor import MllamaImageProcessor
from mllama_jax.processing.tokenizer import MllamaTokenizer


def argument_names(function: Any, *, without: Iterable[str] = ()) -> tuple[str, ...]:
    """The names of a function's arguments."""
    left_out = {"self", *without}
    return tuple(name for name in inspect.signature(function).parameters if name not in left_out)


IMAGE_OPTIONS = argument_names(
    MllamaImageProcessor.preprocess, without=("images", "return_tensors")
)
TEXT_OPTIONS = argument_names(MllamaTokenizer.__call__, without=("text", "return_tensors"))
COMMON_OPTIONS = ("return_tensors", "allow_special_tokens")

GROUPS = {
    "images_kwargs": IMAGE_OPTIONS,
    "text_kwargs": TEXT_OPTIONS,
    "common_kwargs": COMMON_OPTIONS,
}
"""What each group of options may hold; those in common may stand in any."""

# Arguments of transformers' method that would be lost in silence among a template's variables.
_UNSUPPORTED = ("return_assistant_tokens_mask", "return_offsets_mapping")

Options = dict[str, Any]


def sort_options(
    groups: Mapping[str, Mapping[str, Any] | None], flat: Mapping[str, Any]
) -> tuple[Options, Options, Options]:
    """Options for images, for text and for both, from groups of them and from flat ones.

    Raises:
        TypeError: an option that nothing knows, in a group that it doesn't belong to, or twice.
    """
    known = (*IMAGE_OPTIONS, *TEXT_OPTIONS, *COMMON_OPTIONS)
    check_names(flat, known, "The processor")
    options: dict[str, Options] = {}
    for group, names in GROUPS.items():
        given = dict(groups[group] or {})
        if twice := [name for name in given if name in flat]:
            raise TypeError(f"{twice} are given in {group} and beside it; give them once.")
        check_names(given, (*names, *COMMON_OPTIONS), group)
        options[group] = given | {name: flat[name] for name in names if name in flat}
    images, text, common = (options[group] for group in GROUPS)
    for group, own in (("images_kwargs", images), ("text_kwargs", text)):
        for name in [name for name in COMMON_OPTIONS if name in own]:
            value = own.pop(name)
            if common.setdefault(name, value) != value:
                raise TypeError(f"{name} is {value!r} in {group} and {common[name]!r} elsewhere.")
    return images, text, common


def split_options(options: Mapping[str, Any], *, tokenize: bool) -> tuple[Options, Options]:
    """Options of the processor's call, and what is left: the variables of a chat template.

    Raises:
        TypeError: an option of the call, though nothing is tokenized, or one that doesn't exist.
    """
    names = {*IMAGE_OPTIONS, *TEXT_OPTIONS, *COMMON_OPTIONS, *GROUPS}
    of_call = {name: value for name, value in options.items() if name in names}
    variables = {name: value for name, value in options.items() if name not in names}
    if of_call and not tokenize:
        raise TypeError(
            f"apply_chat_template: {list(of_call)} have no use for text alone; pass tokenize=True, "
            "or give them to the processor together with the text."
        )
    if lost := [name for name in _UNSUPPORTED if name in variables]:
        raise TypeError(f"apply_chat_template: {lost} are not supported.")
    return of_call, variables


def check_names(given: Iterable[str], known: Iterable[str], who: str) -> None:
    """Checks that all names are known.

    Raises:
        TypeError: some are not; each is named with the closest name that is.
    """
    known = sorted(set(known))
    unknown = [name for name in given if name not in known]
    if unknown:
        close = [m for name in unknown for m in difflib.get_close_matches(name, known, n=1)]
        hint = f"did you mean {close}?" if close else f"known are {known}."
        raise TypeError(f"{who} knows no options {unknown}; {hint}")
