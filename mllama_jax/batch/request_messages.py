"""The messages of a chat: both ways to write pictures, OpenAI's and Hugging Face's, become one."""

from typing import Any

from mllama_jax.batch.request_json import Problems, short

__all__ = ["read_messages"]

_ROLES = ("system", "user", "assistant", "tool", "ipython")
_PICTURE_KEYS = ("image", "url", "path", "base64")
_KEPT = ("role", "content", "name")
# What clients write into messages that they send back, and no template reads.
_IGNORED = ("tool_call_id", "annotations", "refusal", "reasoning_content", "id")


def read_messages(value: Any, problems: Problems) -> tuple[dict[str, Any], ...]:
    """Messages for a chat template, image parts as ``{"type": "image", "image": source}``."""
    if not isinstance(value, list) or not value:
        problems.add("messages", f"found {short(value)}, expected a list of at least one message")
        return ()
    return tuple(_message(message, f"messages[{i}]", problems) for i, message in enumerate(value))


def _message(value: Any, where: str, problems: Problems) -> dict[str, Any]:
    if not isinstance(value, dict):
        problems.add(where, f'found {short(value)}, expected {{"role": …, "content": …}}')
        return {}
    role = value.get("role")
    if role not in _ROLES:
        hint = '; write "system"' if role == "developer" else ""
        problems.add(
            f"{where}.role", f"found {short(role)}, expected one of {', '.join(_ROLES)}{hint}"
        )
    name = value.get("name")
    if name is not None and not isinstance(name, str):
        problems.add(f"{where}.name", f"found {short(name)}, expected a text")
    for key, item in value.items():
        if key not in _KEPT and key not in _IGNORED and item not in (None, []):
            problems.add(where, f"{short(key)} is not supported in a message")
    message = {"role": role, "content": _content(value.get("content"), where, problems)}
    return message if name is None else message | {"name": name}


def _content(value: Any, where: str, problems: Problems) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        problems.add(
            f"{where}.content", f"found {short(value)}, expected a text or a list of parts"
        )
        return ""
    return [_part(part, f"{where}.content[{i}]", problems) for i, part in enumerate(value)]


def _part(value: Any, where: str, problems: Problems) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    source = None
    if kind == "text":
        if not isinstance(text := value.get("text"), str):
            problems.add(where, f'its "text" is {short(text)}, expected a text')
        _check_keys(value, ("type", "text"), where, problems)
        return {"type": "text", "text": text}
    if kind == "image_url":
        url = value.get("image_url")
        source = url.get("url") if isinstance(url, dict) else url
        keys: tuple[str, ...] = ("type", "image_url", "detail", "uuid")
        if isinstance(url, dict):
            _check_keys(url, ("url", "detail"), where, problems)
    elif kind == "image":
        given = {key: value[key] for key in _PICTURE_KEYS if value.get(key) is not None}
        keys = ("type", *_PICTURE_KEYS)
        if len(given) == 1:
            [(key, source)] = given.items()
            if key == "base64" and isinstance(source, str):
                source = f"data:image/*;base64,{source}"
    else:
        found = f"of type {short(kind)}" if isinstance(value, dict) else short(value)
        problems.add(
            where,
            f'found a part {found}, expected {{"type": "text", "text": …}}, {{"type": "image_url", '
            '"image_url": {"url": …}} or {"type": "image", "image": …}',
        )
        return {}
    if not isinstance(source, str) or not source:
        problems.add(
            where,
            "its picture is missing or given in more than one way; expected one path, file: or "
            'data: URL, under "url" of "image_url", or for "type": "image" under '
            f"one of {', '.join(_PICTURE_KEYS)}",
        )
    _check_keys(value, keys, where, problems)
    return {"type": "image", "image": source}


def _check_keys(
    value: dict[str, Any], known: tuple[str, ...], where: str, problems: Problems
) -> None:
    for key, item in value.items():
        if key not in known and item is not None:
            problems.add(where, f"{short(key)} is not supported in a part")
