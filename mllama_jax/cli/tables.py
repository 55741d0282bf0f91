"""Plain text in columns: it can be read, searched and cut, on a terminal or in a file."""

from collections.abc import Collection, Sequence


def columns(rows: Sequence[Sequence[object]], right: Collection[int] = ()) -> str:
    """Lines whose cells begin, or in the columns of `right` end, below each other.

    Args:
        rows: cells; `str` makes text of them.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number in right else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    )


def indented(text: str, by: int = 2) -> str:
    """A text of several lines behind a margin."""
    return "\n".join(" " * by + line for line in text.splitlines())
