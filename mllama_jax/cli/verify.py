"""``mllama-jax verify``: whether two checkpoints hold the same."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from mllama_jax.cli.tables import columns

if TYPE_CHECKING:
    from mllama_jax.convert.verification import Compared, Verification

_SHOWN_TENSORS = 10


def verify(
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")],
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")],
    atol: float | None = None,
    rtol: float | None = None,
    base: str | None = None,
    revision: str | None = None,
    workers: int | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Compare two checkpoints of any formats, tensor by tensor.

    Without a tolerance, tensors are equal if shape, dtype and every bit are the same (0.0 and -0.0
    differ). With one, dtypes may differ and all numbers must satisfy |A - B| <= atol + rtol * |B|;
    a NaN is then close to a NaN. If one holds a whole model and the other a part of it, that part
    is compared. The exit status is 0 if they are equal, 1 if they differ, and 2 if they can't be
    compared.

    For example:
      $ mllama-jax verify Llama-3.2-11B-Vision converted
      $ mllama-jax verify --atol 0 model-bfloat16 the-same-in-float32
      $ mllama-jax verify --rtol 0.004 model-float32 rounded-to-bfloat16

    Args:
        a: a folder of any format that can be converted, or a hub id (owner/name).
        b: the other one.
        atol: absolute tolerance; 0 asks for the same numbers in any dtypes.
        rtol: tolerance relative to B.
        base: if A is a LoRA adapter, the model that it is for.
        revision: of A, if that is a hub id: branch, tag or commit.
        workers: threads that read; by default one for each processor, at most 8.
        as_json: print one JSON document instead of a report.
    """
    from mllama_jax.convert.progress import ByteProgress
    from mllama_jax.convert.sources import open_source
    from mllama_jax.convert.verification import compare, pair

    try:
        pairing = pair(open_source(a, revision=revision, base=base), b)
        with ByteProgress(pairing.num_bytes, "comparing") as bar:
            found = compare(pairing, atol=atol, rtol=rtol, workers=workers, progress=bar.add)
    except (OSError, ValueError, ImportError) as error:
        # Status 1, which main() would give, means that they differ.
        print(f"mllama-jax: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(found.to_json(), indent=2) if as_json else report(found))
    if not found.equal:
        sys.exit(1)


def report(found: "Verification") -> str:
    """What a person reads."""
    sections = [
        columns([("A", found.a, found.format_a), ("B", found.b, found.format_b)]),
        _verdict(found),
        *_disagreements(found),
    ]
    worst = found.differing or _inexact(found)
    if worst:
        sections.append(_table(worst))
    if found.config_differences:
        sections.append(
            _list("configurations differ (no part of the verdict)", found.config_differences)
        )
    if found.notes:
        sections.append(_list("notes", found.notes))
    return "\n\n".join(sections)


def _verdict(found: "Verification") -> str:
    count = len(found.tensors)
    if found.tolerance is None:
        same, differ = "have the same dtype, shape and bits", "differ in dtype or bits"
    else:
        limit = f"{found.tolerance.atol:g} + {found.tolerance.rtol:g} * |B|"
        same, differ = f"differ by no more than {limit}", f"differ by more than {limit}"
    if found.equal:
        return f"Equal: all {count} tensors {same}."
    if not found.differing:
        return f"Different; the {count} tensors that can be compared {same}."
    return f"Different: {len(found.differing)} of {count} tensors {differ}."


def _disagreements(found: "Verification") -> Iterator[str]:
    from mllama_jax.convert.mismatch import merged, merged_with_remarks

    for title, names in (("only in A", found.only_in_a), ("only in B", found.only_in_b)):
        if names:
            yield _list(f"{title} ({len(names)})", merged(names))
    remarks = {
        "other shapes": [(name, f": {a} in A, {b} in B") for name, a, b in found.misshaped],
        "other dtypes": [
            (t.name, f": {t.dtype_a} in A, {t.dtype_b} in B")
            for t in found.tensors
            if t.dtype_a != t.dtype_b
        ],
        "not finite": [(t.name, _not_finite(t)) for t in found.tensors if _not_finite(t)],
    }
    for title, pairs in remarks.items():
        if pairs:
            yield "\n".join([f"{title} ({len(pairs)}):", *merged_with_remarks(pairs)])


def _not_finite(tensor: "Compared") -> str:
    counts = [
        f"{count} {what} in {where}"
        for where, values in (("A", tensor.values_a), ("B", tensor.values_b))
        for count, what in ((values.nans, "NaN"), (values.infinities, "infinite"))
        if count
    ]
    return f": {', '.join(counts)}" if counts else ""


def _inexact(found: "Verification") -> list["Compared"]:
    """Tensors that are within the tolerance, but not the same."""
    inexact = [tensor for tensor in found.tensors if tensor.difference.max_abs > 0]
    return sorted(inexact, key=lambda tensor: -tensor.difference.max_abs)


def _table(worst: Sequence["Compared"]) -> str:
    rows: list[tuple[object, ...]] = [
        ("tensor", "differing", "of", "max |A-B|", "at", "max |A-B|/|B|", "at")
    ]
    for tensor in worst[:_SHOWN_TENSORS]:
        found = tensor.difference
        rows.append(
            (
                *(tensor.name, f"{found.count:,}", f"{math.prod(tensor.shape):,}"),
                *(f"{found.max_abs:.3g}", _place(found.max_abs_index)),
                *(f"{found.max_rel:.3g}", _place(found.max_rel_index)),
            )
        )
    lines = ["the largest differences:", columns(rows, right=(1, 2, 3, 5))]
    if len(worst) > _SHOWN_TENSORS:
        lines.append(f"… and {len(worst) - _SHOWN_TENSORS} more tensors (--json lists them)")
    return "\n".join(lines)


def _place(index: tuple[int, ...] | None) -> str:
    return "" if index is None else f"[{', '.join(map(str, index))}]"


def _list(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)])
