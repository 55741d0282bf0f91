"""Chat templates: the files that hold them, and rendering one in a sandbox.

A template is a program that comes with a checkpoint, so it is not trusted: it runs in jinja2's
immutable sandbox and sees nothing but text, numbers and containers of them.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from etils import epath
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mllama_jax.processing.special_tokens import SpecialTokenEscape

ChatTemplates = str | dict[str, str]
"""One template, or several by name."""

_FILE = "chat_template.jinja"
_OLD_FILE = "chat_template.json"
_FOLDER = "additional_chat_templates"
_SUFFIX = ".jinja"

TEMPLATE_FILES = (_FILE, _OLD_FILE, f"{_FOLDER}/*{_SUFFIX}")
"""Where a folder's templates may lie, as shell patterns."""

_DEFAULT = "default"
_TOOL_USE = "tool_use"


# --- files ---------------------------------------------------------------------------------------


def templates_by_name(
    templates: str | Mapping[str, str] | Sequence[Mapping[str, str]] | None,
) -> ChatTemplates | None:
    """One template as it is, several as a mapping; a lone one named "default" is one template.

    Args:
        templates: a template; several by name; or the `{"name", "template"}` list of
            tokenizer_config.json.

    Raises:
        ValueError: anything else.
    """
    if templates is None or isinstance(templates, str):
        return templates
    try:
        if isinstance(templates, Mapping):
            named = dict(templates)
        else:
            named = {entry["name"]: entry["template"] for entry in templates}
        is_text = all(isinstance(text, str) for item in named.items() for text in item)
    except (TypeError, KeyError):
        is_text = False
    if not is_text:
        raise ValueError(
            f"chat_template is {templates!r}; expected a template's text, a mapping from names to "
            'texts, or a list of {"name": …, "template": …}.'
        )
    return named[_DEFAULT] if set(named) == {_DEFAULT} else named or None


def read_chat_templates(folder: epath.Path) -> ChatTemplates | None:
    """The templates that have files of their own in a folder; None if there are none.

    chat_template.jinja wins over chat_template.json, its predecessor.

    Raises:
        ValueError: a file that is not what it should be.
    """
    named = {}
    if (folder / _FILE).exists():
        named[_DEFAULT] = _read_text(folder / _FILE)
    elif (folder / _OLD_FILE).exists():
        named[_DEFAULT] = _read_old_file(folder / _OLD_FILE)
    if (folder / _FOLDER).is_dir():
        for file in sorted((folder / _FOLDER).glob(f"*{_SUFFIX}")):
            named[file.name.removesuffix(_SUFFIX)] = _read_text(file)
    return templates_by_name(named)


def write_chat_templates(folder: epath.Path, templates: ChatTemplates | None) -> None:
    """Writes templates to files of their own, in place of any that the folder has.

    Raises:
        ValueError: a name that can't be a file's.
    """
    named = {_DEFAULT: templates} if isinstance(templates, str) else templates or {}
    bad = [name for name in named if not name or name.startswith(".") or set(name) & set("/\\\0")]
    if bad:
        raise ValueError(f"Chat templates are named {bad}, which can't be names of files.")
    old = [folder / _FILE, folder / _OLD_FILE]
    if (folder / _FOLDER).is_dir():
        old += (folder / _FOLDER).glob(f"*{_SUFFIX}")
    for file in old:
        file.unlink(missing_ok=True)
    for name, text in named.items():
        file = folder / _FILE if name == _DEFAULT else folder / _FOLDER / f"{name}{_SUFFIX}"
        file.parent.mkdir(parents=True, exist_ok=True)
        # As bytes: line ends are a part of the template.
        file.write_bytes(text.encode())


def _read_text(file: epath.Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(file)!r} is no UTF-8 text: {error}") from error


def _read_old_file(file: epath.Path) -> str:
    try:
        template = json.loads(_read_text(file))["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{os.fspath(file)!r}: expected a JSON object with a 'chat_template'; found {error!r}"
        ) from error
    if not isinstance(template, str):
        raise ValueError(
            f"{os.fspath(file)!r}: its 'chat_template' is a {type(template).__name__}, expected "
            "text. Several templates go into files of their own."
        )
    return template


# --- choice and rendering ------------------------------------------------------------------------


def choose_template(templates: ChatTemplates | None, wanted: str | None, *, tools: bool) -> str:
    """The template to render.

    Args:
        templates: those of the checkpoint.
        wanted: the name of one of them, or a template's text; None: the one for tools if there are
            tools, else the default one.

    Raises:
        ValueError: there is no such template.
    """
    if not isinstance(templates, dict):
        chosen = templates if wanted is None else wanted
        if chosen is None:
            raise ValueError(
                "This checkpoint has no chat template (chat_template.jinja, chat_template.json or "
                "a field of tokenizer_config.json): pass one as chat_template=…, or use a prompt."
            )
        return chosen
    if wanted is not None:
        return templates.get(wanted, wanted)
    names = [_TOOL_USE, _DEFAULT] if tools else [_DEFAULT]
    for name in names:
        if name in templates:
            return templates[name]
    raise ValueError(
        f"There are chat templates {sorted(templates)}, and none is named {_DEFAULT!r}: choose one "
        "with chat_template=…."
    )


def render_template(
    template: str,
    escape: SpecialTokenEscape,
    variables: Mapping[str, Any],
    date_string: str | None = None,
) -> str:
    """What a template makes of its variables (`messages`, `tools`, `bos_token`, …).

    Args:
        template: the text of a Jinja template. It has what transformers gives one: `tojson`,
            `raise_exception`, `strftime_now`, `{% break %}` and `{% continue %}`,
            `{% generation %}` (which changes nothing here); lines that only hold tags leave no
            line.
        escape: the escape of the text in `variables`; `tojson` keeps it intact.
        variables: plain data; whatever a method of theirs can do, a template can do.
        date_string: today's date as the template should see it: its variable `date_string`, and
            what `strftime_now` returns. None: neither; `strftime_now` tells the date.

    Raises:
        ValueError: the template is broken, refuses the variables, or tries what it must not.

    Source: transformers 4.54.1, chat_template_utils.py: _compile_jinja_template.
    """
    dated = {}
    if date_string is not None:
        dated = {"date_string": date_string, "strftime_now": lambda format: date_string}
    try:
        return _compile(template, escape).render({**variables, **dated})
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"The chat template is broken in line {error.lineno}: {error.message}"
        ) from error
    except jinja2.sandbox.SecurityError as error:
        raise ValueError(
            f"The chat template tries what no template may: {error}. Don't trust this checkpoint."
        ) from error
    except Exception as error:  # It is a program, and may fail in any way.
        raise ValueError(
            f"The chat template can't render this conversation: {type(error).__name__}: {error}"
        ) from error


def cut_behind_last_text(prompt: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """`prompt` up to the end of the last message's text, whose spaces behind it may be trimmed.

    Source: transformers 4.54.1, chat_template_utils.py: render_jinja_template.

    Raises:
        ValueError: there is no such text.
    """
    content = messages[-1].get("content")
    texts = [content] if isinstance(content, str) else [p.get("text") for p in content or ()]
    text = next((text for text in reversed(texts) if text is not None), None)
    if text is None or text.strip() not in prompt:
        raise ValueError(
            "continue_final_message=True, but the last message has no text, or the chat template "
            f"leaves it out: {content!r}"
        )
    start = prompt.rindex(text.strip())
    whole = text.lstrip()
    end = len(whole) if prompt[start:].startswith(whole) else len(text.strip())
    return prompt[: start + end]


@lru_cache(maxsize=32)
def _compile(template: str, escape: SpecialTokenEscape) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json(escape)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant says, as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so.

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(escape: SpecialTokenEscape) -> Callable[..., str]:
    """The filter `tojson`, without jinja2's own escaping for HTML."""

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        return escape.restore_json(text) if ensure_ascii else text

    return tojson


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
