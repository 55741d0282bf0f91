"""Pictures of handwritten digits: scikit-learn's 8x8 scans, split once and drawn on paper."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT_PER_DIGIT = 40
TILE = 32
"""Pixels of a tile's side; paper sizes below are chosen around it."""

# Tiles (wide, high) that a sheet of paper fills, and how often it is drawn so.
_SHEETS = {(1, 1): 0.55, (2, 1): 0.15, (1, 2): 0.15, (2, 2): 0.15}


@dataclass(frozen=True)
class Scan:
    """One scan of the data set: `ink` is (8, 8), 0 (paper) to 16; `index` its place there."""

    index: int
    digit: int
    ink: np.ndarray


def load_scans() -> tuple[list[Scan], list[Scan]]:
    """The training and the held-out scans, disjoint; the held-out ones are as many of each digit.

    Which ones are held out follows from a hash of their index, so it never changes.
    """
    data = load_digits()
    scans = [Scan(i, int(data.target[i]), data.images[i]) for i in range(len(data.target))]
    ordered = sorted(scans, key=lambda scan: hashlib.sha256(b"%d" % scan.index).digest())
    held_out = {
        scan.index
        for digit in range(10)
        for scan in [scan for scan in ordered if scan.digit == digit][:HELD_OUT_PER_DIGIT]
    }
    train = [scan for scan in scans if scan.index not in held_out]
    return train, [scan for scan in scans if scan.index in held_out]


def draw(scan: Scan, rng: np.random.Generator, *, distort: bool) -> Image.Image:
    """Draws a scan in dark ink on a light sheet of 24x24 to 64x64 pixels, a third of them oblong.

    Args:
        scan: what to draw.
        rng: decides the sheet's size, the digit's place on an oblong sheet, and the colours.
        distort: also shift, turn, slant and rescale the digit a little.
    """
    tiles = list(_SHEETS)[rng.choice(len(_SHEETS), p=list(_SHEETS.values()))]
    # Between one tile and the next smaller sheet, so that the tiles' number is as chosen.
    width, height = (int(rng.integers(TILE * n - 7, TILE * n + 1)) for n in tiles)
    side = min(width, height)
    left, top = (int(rng.integers(0, room - side + 1)) for room in (width, height))
    blank = np.zeros((12, 12), np.float32)
    blank[2:10, 2:10] = scan.ink / 16
    ink = Image.fromarray(blank, mode="F").transform(
        (side, side),
        Image.Transform.AFFINE,
        _sheet_to_scan(side, rng if distort else None),
        resample=Image.Resampling.BICUBIC,
    )
    coverage = np.zeros((height, width, 1), np.float32)
    coverage[top : top + side, left : left + side, 0] = np.clip(np.asarray(ink), 0, 1)
    paper = rng.uniform(215, 255, size=3)
    pen = rng.uniform(0, 70, size=3)
    pixels = paper * (1 - coverage) + pen * coverage
    return Image.fromarray(pixels.round().astype(np.uint8))


def _sheet_to_scan(side: int, rng: np.random.Generator | None) -> tuple[float, ...]:
    """Pillow's six numbers: from a pixel of the sheet to a place on the 12x12 bordered scan."""
    turn, slant, zoom, shift = 0.0, 0.0, 1.0, np.zeros(2)
    if rng is not None:
        turn = math.radians(rng.uniform(-14, 14))
        slant = rng.uniform(-0.2, 0.2)
        zoom = rng.uniform(0.8, 1.15)
        shift = rng.uniform(-0.9, 0.9, size=2)
    # 9 scan pixels fill the sheet: the 8 of the scan and a narrow rim.
    scale = 9 / side / zoom
    turned = np.array(
        [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    ) @ np.array([[1, slant], [0, 1]])
    matrix = turned * scale
    offset = np.array([6.0, 6.0]) + shift - matrix @ np.array([side / 2, side / 2])
    return (*matrix[0], offset[0], *matrix[1], offset[1])
