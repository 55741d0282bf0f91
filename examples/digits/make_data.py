r"""Draws the pictures and writes the questions: training set, held-out set and demo.

Run it from anywhere:

    python examples/digits/make_data.py                 # runs/digits/data: train and held-out
    python examples/digits/make_data.py --demo examples/digits/demo    # also the committed few
    python examples/digits/make_data.py --shift 3 --output runs/digits/shifted --drawings 5 \
        --records 20000                                 # what lora.yaml learns

The same command always writes the same files.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from pictures import Scan, draw, load_scans
from questions import Picture, even_or_odd, read_two, text_only, two_pictures, which_digit

DEMO_SEED = 1


@dataclass(frozen=True)
class Options:
    """What to write, and where."""

    output: Path = Path("runs/digits/data")
    """Folder for train.jsonl, held_out.jsonl and pictures/."""
    demo: Path | None = None
    """Folder for the demo's pictures and questions, taken from the held-out scans."""
    drawings: int = 40
    """Drawings of each training scan, each distorted differently."""
    records: int = 120_000
    """Training conversations."""
    seed: int = 0
    shift: int = 0
    """Every digit goes by the name of the one so many further, and 0 comes after 9: something for
    a trained model to learn anew."""


def make_data(options: Options) -> None:
    """Writes the training set and the held-out set, and the demo if asked."""
    train_scans, held_out_scans = load_scans()
    rng = np.random.default_rng(options.seed)
    train = [
        picture
        for drawing in range(options.drawings)
        for picture in draw_all(train_scans, options.output, f"train{drawing}", rng, distort=True)
    ]
    held_out = draw_all(held_out_scans, options.output, "held_out", rng, distort=False)
    train, held_out = (renamed(pictures, options.shift) for pictures in (train, held_out))
    write_jsonl(options.output / "train.jsonl", training_records(train, options.records, rng))
    write_jsonl(options.output / "held_out.jsonl", held_out_records(held_out, rng))
    print(f"{len(train_scans)} scans drawn {options.drawings} times for training,", end=" ")
    print(f"{len(held_out_scans)} others held out: {options.output}")
    if options.demo is not None:
        make_demo(held_out_scans, options.demo)
        print(f"Demo: {options.demo}")


def draw_all(
    scans: list[Scan], folder: Path, prefix: str, rng: np.random.Generator, *, distort: bool
) -> list[Picture]:
    """Draws each scan once into `folder`/pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    pictures = [Picture(f"pictures/{prefix}_{scan.index:04d}.png", scan.digit) for scan in scans]
    for picture, scan in zip(pictures, scans, strict=True):
        draw(scan, rng, distort=distort).save(folder / picture.path)
    return pictures


def renamed(pictures: list[Picture], shift: int) -> list[Picture]:
    """Each picture's digit by the name of the one that is `shift` further."""
    return [Picture(picture.path, (picture.digit + shift) % 10) for picture in pictures]


def training_records(
    pictures: list[Picture], count: int, rng: np.random.Generator
) -> Iterable[dict]:
    """Conversations of all kinds about random pictures."""
    kinds = ("which digit", "even or odd", "two pictures", "read two", "text only")
    for kind in rng.choice(kinds, size=count, p=(0.32, 0.13, 0.25, 0.2, 0.1)):
        first, second = (pictures[i] for i in rng.integers(len(pictures), size=2))
        if kind == "which digit":
            yield which_digit(first, rng)
        elif kind == "even or odd":
            yield even_or_odd(first, rng)
        elif kind == "two pictures":
            yield two_pictures(first, second, rng)
        elif kind == "read two":
            yield read_two(first, second, rng)
        else:
            yield text_only(rng)


def held_out_records(pictures: list[Picture], rng: np.random.Generator) -> Iterable[dict]:
    """Each picture asked about once in every kind of question, and 100 questions without one."""
    partners = [pictures[i] for i in rng.permutation(len(pictures))]
    for picture, partner in zip(pictures, partners, strict=True):
        yield which_digit(picture, rng)
        yield even_or_odd(picture, rng)
        yield two_pictures(picture, partner, rng)
        yield read_two(picture, partner, rng)
    for _ in range(100):
        yield text_only(rng)


def make_demo(scans: list[Scan], folder: Path) -> None:
    """Fourteen held-out pictures, every digit among them, and 22 questions of all kinds."""
    rng = np.random.default_rng(DEMO_SEED)
    digits = [*range(10), *rng.choice(10, size=4, replace=False)]
    shown: list[Scan] = []
    for digit in digits:
        unused = [scan for scan in scans if scan.digit == digit and scan not in shown]
        shown.append(unused[rng.integers(len(unused))])
    pictures = draw_all(shown, folder, "digit", rng, distort=False)
    pairs = rng.permutation(len(pictures)).reshape(-1, 2)
    records = [
        *(which_digit(picture, rng) for picture in pictures[:10]),
        *(even_or_odd(picture, rng) for picture in pictures[10:]),
        *(two_pictures(pictures[i], pictures[j], rng) for i, j in pairs[:4]),
        *(read_two(pictures[i], pictures[j], rng) for i, j in pairs[4:6]),
        *(text_only(rng) for _ in range(2)),
    ]
    write_jsonl(folder / "questions.jsonl", records)


def write_jsonl(file: Path, records: Iterable[dict]) -> None:
    """Writes one record a line."""
    with file.open("w") as out:
        for record in records:
            out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    make_data(tyro.cli(Options, description=__doc__))
