"""``mllama-jax inspect``: what a checkpoint is, and what is odd about it."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mllama_jax.cli.tables import columns, indented

if TYPE_CHECKING:
    from mllama_jax.convert.inspection import Inspection, Part

_SHOWN_FILES = 8


def inspect(
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")],
    headers_only: bool = False,
    base: str | None = None,
    revision: str | None = None,
    workers: int | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Say what a checkpoint is, how large, and what is odd about it.

    Odd are, among others: tensors that are missing, unexpected or misshaped; NaN, infinite and
    all-zero tensors; gates of zero; values that float16 can't hold; mixed dtypes; absent tokenizer
    files; files that are not what the hub published. The exit status is 0 if the checkpoint can be
    read, whatever is odd, and 1 if it can't.

    For example:
      $ mllama-jax inspect meta-llama/Llama-3.2-11B-Vision-Instruct
      $ mllama-jax inspect --headers-only checkpoints/run7
      $ mllama-jax inspect --json model | jq '.oddities[].kind'

    Args:
        path: a folder of any format that can be converted, or a hub id (owner/name).
        headers_only: look at names, shapes and dtypes only; read no value and no hash.
        base: for a LoRA adapter, the model that it is for.
        revision: branch, tag or commit of a hub id.
        workers: threads that read; by default one for each processor, at most 8.
        as_json: print one JSON document instead of a report.
    """
    from mllama_jax.convert.inspection import bytes_to_read
    from mllama_jax.convert.inspection import inspect as look
    from mllama_jax.convert.progress import ByteProgress
    from mllama_jax.convert.sources import open_source

    source = open_source(path, revision=revision, base=base)
    if headers_only:
        found = look(source, values=False)
    else:
        with ByteProgress(bytes_to_read(source), "inspecting") as bar:
            found = look(source, workers=workers, progress=bar.add)
    print(json.dumps(found.to_json(), indent=2) if as_json else report(found))


def report(found: "Inspection") -> str:
    """What a person reads."""
    sections = [
        "\n".join(_head(found)),
        columns(
            [
                ("part", "tensors", "parameters", "size", "dtype"),
                *map(_part_row, found.parts),
                _part_row(found.total),
            ],
            right=(1, 2, 3),
        ),
        columns(list(found.dimensions.items()), right=(1,)),
        _files(found),
    ]
    if found.notes:
        sections.append("Notes:\n" + "\n".join(f"- {note}" for note in found.notes))
    sections.append(_oddities(found))
    return "\n\n".join(sections)


def _head(found: "Inspection") -> list[str]:
    whole = "a whole model" if found.component == "model" else f"a part, {found.component}"
    rows = [("format", found.format)]
    if found.layout is not None:
        rows.append(("names", f"{found.layout} layout"))
    rows.append(("holds", f"{found.architecture} ({whole})"))
    if found.released_as:
        rows.append(("shapes of", " or ".join(f"Llama 3.2 Vision {n}" for n in found.released_as)))
    if found.revision:
        rows.append(("revision", found.revision))
    if found.provenance:
        rows += _origin(found.provenance)
    return [found.path, indented(columns(rows))]


def _origin(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a converter noted about where this came from; the file may be anyone's."""
    tool, source = provenance.get("tool"), provenance.get("source")
    rows = []
    if isinstance(source, dict):
        revision = f" at {source['revision']}" if source.get("revision") else ""
        rows.append(("made from", f"{source.get('path')}{revision} ({source.get('format')})"))
    if isinstance(tool, dict):
        when = f" on {provenance['created']}" if "created" in provenance else ""
        rows.append(("made by", f"{tool.get('name')} {tool.get('version')}{when}"))
    return rows


def _part_row(part: "Part") -> tuple[object, ...]:
    from mllama_jax.convert.progress import size

    # Most bytes first; only several need their sizes.
    dtypes = sorted(part.dtypes.items(), key=lambda item: -item[1])
    if len(dtypes) > 1:
        text = ", ".join(f"{dtype} {size(num_bytes)}" for dtype, num_bytes in dtypes)
    else:
        text = "".join(dtype for dtype, _ in dtypes)
    return part.name, f"{part.tensors:,}", f"{part.parameters:,}", size(part.bytes), text


def _files(found: "Inspection") -> str:
    from mllama_jax.convert.progress import size

    files = list(found.files.items())
    shown = [(f"  {name}", size(num_bytes)) for name, num_bytes in files[:_SHOWN_FILES]]
    title = f"{len(files)} weight files" if len(files) != 1 else "1 weight file"
    lines = [f"{title}, {size(sum(found.files.values()))}:", columns(shown, right=(1,))]
    if len(files) > _SHOWN_FILES:
        lines.append(f"  … and {len(files) - _SHOWN_FILES} more")
    return "\n".join(lines)


def _oddities(found: "Inspection") -> str:
    seen = "" if found.values_read else " (values were not read)"
    if not found.oddities:
        return f"Nothing odd{seen}."
    lines = [f"Odd{seen}:"]
    lines += [f"- {indented(oddity.text).lstrip()}" for oddity in found.oddities]
    return "\n".join(lines)
