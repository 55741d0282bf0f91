"""Pictures to tiles, beside transformers' image processors: Pillow's, and torchvision's if any.

    python benchmarks/preprocessing.py         # three turns
    python benchmarks/preprocessing.py --quick
    python benchmarks/preprocessing.py --peer-python ENV/bin/python   # with current transformers

Each picture is read from its file, decoded and cut into tiles of 560 pixels, as the released models
want them, on one core. Both sides' tiles are compared in the same run; of their processors, the
faster one counts.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, Side, add_peer_python, against_peer, arguments_of, clock, parser, serve
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

    return _tasks(lambda path, kind: processor()(path, return_tensors="np")["pixel_values"])


def peer_side() -> dict[str, Any]:
    import torch
    from PIL import Image
    from transformers.models.mllama import image_processing_mllama as default

    torch.set_num_threads(1)
    try:  # transformers 5 has both, and torchvision's is the default
        from transformers.models.mllama import image_processing_pil_mllama as pillow
    except ImportError:
        kinds = {"Pillow": default.MllamaImageProcessor}
    else:
        kinds = {
            "Pillow": pillow.MllamaImageProcessorPil,
            "torchvision": default.MllamaImageProcessor,
        }

    @cache
    def processor(kind: str) -> Any:
        return kinds[kind](**SETTINGS)

    def process(path: str, kind: str) -> np.ndarray:
        tensors = "pt" if kind == "torchvision" else "np"
        found = processor(kind)(Image.open(path), return_tensors=tensors)["pixel_values"]
        return np.asarray(found)

    return {"kinds": lambda **_: {"kinds": list(kinds)}, **_tasks(process)}


def _tasks(process: Any) -> dict[str, Any]:
    def rate(path: str, kind: str = "", **_: Any) -> dict[str, Any]:
        """Pictures a second, after one that does not count; some of its values."""
        found = process(path, kind)
        number, started = 0, clock()
        while clock() - started < LEAST_SECONDS:
            process(path, kind)
            number += 1
        rate = number / (clock() - started)
        return {"rate": rate, "shape": found.shape, "values": found.ravel()[::9973].tolist()}

    return {"rate": rate}


SIDES = {"ours": ours_side, "peer": peer_side}


def measure(files: dict[str, Path], repeats: int, peer_python: str | None) -> Report:
    report = Report("Pictures to tiles on one core, against transformers", exact=not peer_python)
    ours = Side(__file__, "ours", cores=1)
    peer = Side(__file__, "peer", cores=1, python=peer_python)
    report.notes.append(f"the peer: {peer.versions()}")
    kinds = peer.ask("kinds").values["kinds"]
    for name, file in files.items():
        turns = []
        for _ in range(repeats):
            here = ours.ask("rate", path=str(file)).values
            there = {kind: peer.ask("rate", path=str(file), kind=kind).values for kind in kinds}
            turns.append((here, there))
        here, there = turns[-1]
        for kind, other in there.items():
            assert here["shape"] == other["shape"], (name, kind, here["shape"], other["shape"])
            report.compare(f"{name}, {kind}", here["values"], other["values"], 1e-5)
        best = max(kinds, key=lambda kind: max(turn[1][kind]["rate"] for turn in turns))
        rates = [turn[0]["rate"] for turn in turns], [turn[1][best]["rate"] for turn in turns]
        row = against_peer(f"{name}, {best}", "pictures/s", *rates, aim=AIM)
        print(row.subject, row.ratio, flush=True)
        report.rows.append(row)
    for side in (ours, peer):
        side.close()
    return report


def main() -> None:
    options = parser(__doc__.splitlines()[0], "preprocessing")
    add_peer_python(options)
    options.add_argument("--cache", type=Path, default=CACHE)
    arguments = arguments_of(options)
    if arguments.serve:
        serve(SIDES[arguments.serve](), arguments.cores)
        return
    sizes = dict(list(SIZES.items())[:2]) if arguments.quick else SIZES
    files = write_pictures(arguments.cache / "pictures", sizes)
    repeats = 1 if arguments.quick else arguments.repeats
    report = measure(files, repeats, arguments.peer_python)
    report.write(arguments.output, cores=1)


if __name__ == "__main__":
    main()
