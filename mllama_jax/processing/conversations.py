"""Conversations: the pictures in their messages, and what a chat template gets to see of them."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from mllama_jax.processing.special_tokens import SpecialTokenEscape

Message = Mapping[str, Any]

_PICTURE_KEYS = ("image", "path", "url", "base64")
_PARTS = ("text", "image")
# What a tool returns may be data of any form.
_DATA_ROLES = ("tool", "ipython")


def as_conversations(conversation: Any) -> tuple[list[list[Message]], bool]:
    """A batch of conversations, and whether it was one (else: a single conversation).

    Args:
        conversation: a list of messages, or a list of such lists.

    Raises:
        TypeError, ValueError: anything else; messages and parts are checked too, and errors name
            them ("message 2 of conversation 0", counted from 0).
    """
    if not isinstance(conversation, list | tuple):
        raise TypeError(
            f"A conversation is a list of messages; found a {type(conversation).__name__}."
        )
    if not conversation:
        raise ValueError("The conversation is empty; expected at least one message.")
    batched = isinstance(conversation[0], list | tuple)
    conversations = list(conversation) if batched else [conversation]
    for i, messages in enumerate(conversations):
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(
                f"conversation {i} is {messages!r}; expected a list with at least one message, as "
                "the first is."
            )
        for j, message in enumerate(messages):
            _check_message(message, f"message {j} of conversation {i}")
    return [list(messages) for messages in conversations], batched


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TypeError(f'{where} is {message!r}; expected a mapping with a "role" and "content".')
    content = message.get("content")
    if content is None or isinstance(content, str) or message["role"] in _DATA_ROLES:
        return
    if not isinstance(content, list | tuple):
        raise TypeError(
            f"{where}: its content is a {type(content).__name__}; expected text or a list of parts."
        )
    for k, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _PARTS:
            found = f"of type {kind!r}" if kind else repr(part)
            raise ValueError(
                f'part {k} of {where} is {found}; expected {{"type": "text", "text": …}} or '
                '{"type": "image", "image": …}.'
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f'part {k} of {where} is {part!r}; expected text under "text".')


def pictures_of(messages: Sequence[Message], conversation: int = 0) -> list[Any]:
    """The pictures in the messages of a conversation, in order, as sources that can be loaded.

    Args:
        messages: checked by `as_conversations`.
        conversation: its number, for errors.

    Raises:
        ValueError: an image part with no picture, or with more than one.
    """
    return [
        _picture(part, f"part {k} of message {j} of conversation {conversation}")
        for j, message in enumerate(messages)
        for k, part in enumerate(_parts(message))
        if _is_image(part)
    ]


def _parts(message: Message) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list | tuple) else ()


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _picture(part: Message, where: str) -> Any:
    found = {key: part[key] for key in _PICTURE_KEYS if part.get(key) is not None}
    if len(found) != 1:
        has = f"pictures under {list(found)}" if found else "no picture"
        raise ValueError(
            f"{where} is an image with {has}; expected one, under one of {list(_PICTURE_KEYS)}. "
            "To pass pictures apart from the messages, call apply_chat_template with "
            "tokenize=False and give its text, with images=…, to the processor."
        )
    [(key, picture)] = found.items()
    if key != "base64":
        return picture
    try:
        return base64.b64decode(picture, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{where}: its base64 is broken: {error}") from error


def plain_messages(
    messages: Sequence[Message], escape: SpecialTokenEscape | None
) -> list[dict[str, Any]]:
    """Copies of messages that hold plain data only, with the special tokens in all text escaped.

    Where a picture was, `True` is: a template may ask whether there is one, but must not get hold
    of an object that could open or write files.
    """
    plain = []
    for message in messages:
        message = dict(message)
        if parts := _parts(message):
            message["content"] = [_without_picture(part) for part in parts]
        plain.append(plain_data(message, escape))
    return plain


def _without_picture(part: Any) -> Any:
    if not _is_image(part):
        return part
    return {key: True if key in _PICTURE_KEYS else value for key, value in part.items()}


def plain_data(value: Any, escape: SpecialTokenEscape | None) -> Any:
    """A copy of JSON-like data with the special tokens in all of its text escaped.

    Args:
        value: text, numbers, booleans, None, and mappings, lists and tuples of them.
        escape: None: text stays as it is.

    Raises:
        TypeError: anything else is in it.
    """
    if isinstance(value, str):
        # Of a subclass only the text: a template could call its methods.
        text = str.__str__(value)
        return escape.escape(text) if escape else text
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {plain_data(k, escape): plain_data(v, escape) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, escape) for item in value]
    raise TypeError(
        f"A conversation, or what goes with it, holds a {type(value).__name__} ({value!r:.80}); "
        "chat templates get text, numbers, booleans, None, and mappings and lists of them."
    )
