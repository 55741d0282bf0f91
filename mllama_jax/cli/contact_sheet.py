"""A page of pictures with their questions and answers, for a person to look at."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

_CELL = (300, 250)
_PICTURE_HEIGHT = 140
_MARGIN = 12
_LINE_HEIGHT = 18
_INK, _GREY, _GREEN, _RED = "#1c1c1c", "#6b6b6b", "#1a7f37", "#c62828"


@dataclass(frozen=True)
class Entry:
    """One cell; `expected` is None where no right answer is known."""

    pictures: Sequence[Image.Image]
    question: str
    answer: str
    expected: str | None = None


def contact_sheet(entries: Sequence[Entry], columns: int = 4) -> Image.Image:
    """Draws the entries row by row; a wrong answer is red, with the expected one below it."""
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (columns * _CELL[0], rows * _CELL[1]), "white")
    for index, entry in enumerate(entries):
        left, top = index % columns * _CELL[0], index // columns * _CELL[1]
        sheet.paste(_cell(entry), (left, top))
    return sheet


def _cell(entry: Entry) -> Image.Image:
    cell = Image.new("RGB", _CELL, "white")
    draw = ImageDraw.Draw(cell)
    draw.rectangle((0, 0, _CELL[0] - 1, _CELL[1] - 1), outline="#dddddd")
    _paste_pictures(cell, entry.pictures)
    if not entry.pictures:
        draw.text((_MARGIN, _MARGIN), "(no picture)", _GREY, ImageFont.load_default(14))
    wrong = entry.expected is not None and entry.answer != entry.expected
    top = _PICTURE_HEIGHT + 2 * _MARGIN
    top = _write(draw, entry.question, top, _INK)
    top = _write(draw, entry.answer or "(nothing)", top, _RED if wrong else _GREEN)
    if wrong:
        _write(draw, f"expected: {entry.expected}", top, _GREY)
    return cell


def _paste_pictures(cell: Image.Image, pictures: Sequence[Image.Image]) -> None:
    """Side by side, as large as they fit; small ones are enlarged."""
    if not pictures:
        return
    width = (_CELL[0] - _MARGIN * (len(pictures) + 1)) // len(pictures)
    for index, picture in enumerate(pictures):
        shown = ImageOps.contain(
            picture.convert("RGB"), (width, _PICTURE_HEIGHT), Image.Resampling.NEAREST
        )
        cell.paste(shown, (_MARGIN + index * (width + _MARGIN), _MARGIN))


def _write(draw: ImageDraw.ImageDraw, text: str, top: int, colour: str) -> int:
    """Writes wrapped text; returns where the next line begins."""
    font = ImageFont.load_default(14)
    line = ""
    lines = []
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font) > _CELL[0] - 2 * _MARGIN:
            lines.append(line)
            longer = word
        line = longer
    for shown in [*lines, line]:
        draw.text((_MARGIN, top), shown, colour, font)
        top += _LINE_HEIGHT
    return top
