"""Pictures like those that people have: photographs, screenshots, icons; all drawn from a seed."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZES = {
    "icon 64x64": (64, 64),
    "640x480": (640, 480),
    "1920x1080": (1920, 1080),
    "4000x3000": (4000, 3000),
}
"""Width and height."""
FORMATS = {"jpg": {"format": "JPEG", "quality": 90}, "png": {"format": "PNG"}}


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Clouds with as much detail at every scale as photographs have, shapes with edges, grain."""
    values = np.zeros((height, width, 3), np.float32)
    side = 4
    while side < max(width, height) // 2:
        size = (
            max(2, side * width // max(width, height)),
            max(2, side * height // max(width, height)),
        )
        noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
        layer = noise.resize((width, height), Image.Resampling.BICUBIC)
        values += (np.asarray(layer, np.float32) - 127.5) * (4 / side) ** 0.9
        side *= 2
    values += rng.standard_normal((height, width, 1), np.float32) * 2
    image = Image.fromarray(np.clip(values + 127.5, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, width), rng.integers(0, height)
        size = int(rng.integers(4, max(5, min(width, height) // 4)))
        draw.ellipse((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]] = SIZES) -> dict[str, Path]:
    """A JPEG and a PNG of each size, by names such as "640x480 jpg"; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, (name, size) in enumerate(sizes.items()):
        image = None
        for ending, options in FORMATS.items():
            file = files[f"{name} {ending}"] = folder / f"{name.replace(' ', '_')}.{ending}"
            if file.exists():
                continue
            image = image or photograph(np.random.default_rng(number), *size)
            buffer = io.BytesIO()
            image.save(buffer, **options)
            file.write_bytes(buffer.getvalue())
    return files
