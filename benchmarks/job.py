"""The mixed job: requests of every length, with no picture or up to three, as one JSONL file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from models import ROOT
from PIL import Image, ImageDraw

NUM_PICTURES = (0.35, 0.35, 0.2, 0.1)
"""How many requests of all have 0, 1, 2 and 3 pictures."""
PROMPT_TOKENS = (5, 800)
ANSWER_TOKENS = (4, 200)
PICTURE_SIDES = (48, 700)
IMAGE, BOS = "<|image|>", "<|begin_of_text|>"


def write_job(folder: Path, tokenizer: Any, num_requests: int, seed: int = 0) -> Path:
    """Writes requests.jsonl and the pictures that it names, all different, into a folder.

    Pictures come first in a prompt: transformers lets tokens before the first picture attend to it.
    Lengths are spread evenly over their logarithms.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer.encode((ROOT / "LICENSE").read_text(), add_special_tokens=False)
    with (folder / "requests.jsonl").open("w") as file:
        for number in range(num_requests):
            pictures = []
            for index in range(rng.choice(len(NUM_PICTURES), p=NUM_PICTURES)):
                pictures.append(f"{number}_{index}.jpg")
                _picture(rng).save(folder / pictures[-1], quality=90)
            length = _between(rng, *PROMPT_TOKENS)
            start = rng.integers(0, len(words) - length)
            text = tokenizer.decode(words[start : start + length - 1])
            body = {
                "model": "small",
                "prompt": IMAGE * len(pictures) + BOS + text,
                "max_tokens": _between(rng, *ANSWER_TOKENS),
                "temperature": 0,
            }
            if pictures:
                body["images"] = pictures
            line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")
    return folder / "requests.jsonl"


def read_job(path: str, ids: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The requests as records; only those of some ids, in the file's order."""
    with open(path) as file:
        for line in file:
            record = json.loads(line)
            if ids is None or record["custom_id"] in ids:
                yield record


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return round(np.exp(rng.uniform(np.log(low), np.log(high))))


def _picture(rng: np.random.Generator) -> Image.Image:
    """Shapes in random colours on a gradient."""
    width, height = (_between(rng, *PICTURE_SIDES) for _ in range(2))
    ramp = np.linspace(0, 1, width * height * 3).reshape(height, width, 3)
    image = Image.fromarray((255 * np.roll(ramp, rng.integers(3), -1)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(0, width), rng.integers(0, height)
        size = int(rng.integers(5, max(6, min(width, height) // 2)))
        draw.ellipse((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image
