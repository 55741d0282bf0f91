"""One readable message for all the names and shapes in which a checkpoint and a model disagree."""

import difflib
import re
from collections.abc import Iterable, Sequence

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")

Misshaped = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name, shape found, shape expected."""


def describe(
    *,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    misshaped: Sequence[Misshaped] = (),
    other: Sequence[tuple[str, str]] = (),
) -> str:
    """The lines of an error message; empty if nothing is wrong.

    The same tensor of several layers takes one line (`layers.{0-3,5}.mlp…`). A missing name is
    shown with the nearest unexpected one, which tells a misspelling from a missing part.

    Args:
        other: (name, what is wrong with it).
    """
    lines: list[str] = []
    missing_lines, unexpected_lines = merged(missing), merged(unexpected)
    if missing:
        lines.append(f"missing ({len(missing)}):")
        lines += [f"  {name}{_nearest(name, unexpected_lines)}" for name in missing_lines]
    if unexpected:
        lines.append(f"unexpected ({len(unexpected)}):")
        lines += [f"  {name}" for name in unexpected_lines]
    if misshaped:
        lines.append(f"misshaped ({len(misshaped)}):")
        lines += merged_with_remarks(
            (name, f": found {found}, expected {expected}") for name, found, expected in misshaped
        )
    if other:
        lines.append(f"unusable ({len(other)}):")
        lines += merged_with_remarks((name, f": {problem}") for name, problem in other)
    return "\n".join(lines)


def merged_with_remarks(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Indented lines: names, merged where they share a remark, and the remark behind them."""
    by_remark: dict[str, list[str]] = {}
    for name, remark in pairs:
        by_remark.setdefault(remark, []).append(name)
    return [f"  {name}{remark}" for remark, names in by_remark.items() for name in merged(names)]


def merged(names: Iterable[str]) -> list[str]:
    """Names that differ in the layer's number alone become one, in the order of their first."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number = _LAYER.search(name)
        layers.setdefault(without_layer(name), []).extend([int(number[0])] if number else [])
    return [
        name.replace("{}", f"{{{_ranges(numbers)}}}" if len(numbers) > 1 else str(*numbers), 1)
        for name, numbers in layers.items()
    ]


def without_layer(name: str) -> str:
    """What `merged` goes by: a name with `{}` for the layer's number."""
    return _LAYER.sub("{}", name, count=1)


def _ranges(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` -> `"0-2,5"`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _nearest(name: str, candidates: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f"   (nearest that is there: {found[0]})" if found else ""
