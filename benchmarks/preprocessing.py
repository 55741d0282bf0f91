"""Pictures to tiles, beside transformers' image processor (Pillow).

    python benchmarks/preprocessing.py         # three turns
    python benchmarks/preprocessing.py --quick

Each picture is read from its file, decoded and cut into tiles of 560 pixels, as the released models
want them, on one core. Both sides' tiles are compared in the same run.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, Side, against_peer, arguments_of, clock, parser, serve
from models import CACHE
from pictures import SIZES, write_pictures

SETTINGS: dict[str, Any] = {
    "size": {"height": 560, "width": 560},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_image_tiles": 4,
}
LEAST_SECONDS = 1.0
"""That a turn lasts at least."""
AIM = 2.0


def ours_side() -> dict[str, Any]:
    from mllama_jax import MllamaImageProcessor

    @cache
    def processor() -> Any:
        return MllamaImageProcessor(**SETTINGS)

    return _tasks(lambda path: processor()(path, return_tensors="np")["pixel_values"])


def peer_side() -> dict[str, Any]:
    from PIL import Image
    from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor

    @cache
    def processor() -> Any:
        return MllamaImageProcessor(**SETTINGS)

    return _tasks(lambda path: processor()(Image.open(path), return_tensors="np")["pixel_values"])


def _tasks(process: Any) -> dict[str, Any]:
    def rate(path: str, **_: Any) -> dict[str, Any]:
        """Pictures a second, after one that does not count; some of its values."""
        found = process(path)
        number, started = 0, clock()
        while clock() - started < LEAST_SECONDS:
            process(path)
            number += 1
        rate = number / (clock() - started)
        return {"rate": rate, "shape": found.shape, "values": found.ravel()[::9973].tolist()}

    return {"rate": rate}


SIDES = {"ours": ours_side, "peer": peer_side}


def measure(files: dict[str, Path], repeats: int) -> Report:
    report = Report("Pictures to tiles on one core, against transformers")
    ours, peer = (Side(__file__, name, cores=1) for name in SIDES)
    for name, file in files.items():
        found = [
            [side.ask("rate", path=str(file)).values for side in (ours, peer)]
            for _ in range(repeats)
        ]
        here, there = found[0]
        assert here["shape"] == there["shape"], (name, here["shape"], there["shape"])
        np.testing.assert_allclose(here["values"], there["values"], atol=1e-5, err_msg=name)
        rates = [[turn[side]["rate"] for turn in found] for side in range(2)]
        row = against_peer(name, "pictures/s", *rates, aim=AIM)
        print(name, row.ratio, flush=True)
        report.rows.append(row)
    for side in (ours, peer):
        side.close()
    return report


def main() -> None:
    options = parser(__doc__.splitlines()[0], "preprocessing")
    options.add_argument("--cache", type=Path, default=CACHE)
    arguments = arguments_of(options)
    if arguments.serve:
        serve(SIDES[arguments.serve](), arguments.cores)
        return
    sizes = dict(list(SIZES.items())[:2]) if arguments.quick else SIZES
    files = write_pictures(arguments.cache / "pictures", sizes)
    report = measure(files, 1 if arguments.quick else arguments.repeats)
    report.write(arguments.output, cores=1)


if __name__ == "__main__":
    main()
