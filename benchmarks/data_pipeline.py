"""Training batches out of files, beside PyTorch's DataLoader with transformers' processor.

    python benchmarks/data_pipeline.py         # three turns, one and two cores
    python benchmarks/data_pipeline.py --quick
    python benchmarks/data_pipeline.py --peer-python ENV/bin/python   # with current transformers

Conversations of 100 to 300 tokens, each with a photograph of 640 × 480 pixels; batches of 8, padded
to 512, tiles of 560 pixels. Nothing is trained: what is counted is how fast batches can be had.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    Report,
    Side,
    add_peer_python,
    against_peer,
    arguments_of,
    clock,
    gibibytes,
    parser,
    serve,
)
from models import CACHE, ROOT, model_folder
from pictures import photograph

CONVERSATIONS, PICTURES = 512, 32
BATCH_SIZE, LENGTH, TILE = 8, 512, 560
BATCHES = 12
AIM = 2.0


def write_data(cache: Path) -> Path:
    """Conversations with pictures, and a processor with tiles of the released size."""
    folder, model = cache / "conversations", model_folder(cache)
    if (folder / "train.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.startswith("model"):
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"height": TILE, "width": TILE}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        photograph(rng, 640, 480).save(folder / f"{number}.jpg", quality=90)
    words = (ROOT / "LICENSE").read_text().split()
    with (folder / "part").open("w") as file:
        for number in range(CONVERSATIONS):
            start, length = rng.integers(0, len(words) - 200), rng.integers(60, 180)
            image = {"type": "image_url", "image_url": {"url": f"{number % PICTURES}.jpg"}}
            content = [image, {"type": "text", "text": "What is written below the picture?"}]
            answer = " ".join(words[start : start + length])
            messages = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    (folder / "part").rename(folder / "train.jsonl")
    return folder


def ours_side() -> dict[str, Any]:
    from mllama_jax import MllamaProcessor
    from mllama_jax.train.data.batches import make_dataset
    from mllama_jax.train.data.settings import DataConfig
    from mllama_jax.train.data.sources import open_sources

    @cache
    def opened(folder: str, workers: int) -> Any:
        config = DataConfig(
            train=f"{folder}/train.jsonl",
            batch_size=BATCH_SIZE,
            lengths=(LENGTH,),
            threads=workers,
        )
        processor = MllamaProcessor.from_pretrained(folder)
        rows = range(BATCH_SIZE)
        dataset = make_dataset(
            open_sources(config), processor, config, steps=9999, seed=0, rows=rows
        )
        return iter(dataset)

    def batches(folder: str, workers: int, **_: Any) -> dict[str, Any]:
        return _rate(opened(folder, workers), lambda batch: batch.arrays)

    return {"batches": batches}


def peer_side() -> dict[str, Any]:
    import torch
    from PIL import Image
    from transformers import AutoTokenizer
    from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor
    from transformers.models.mllama.processing_mllama import MllamaProcessor

    @cache
    def opened(folder: str, workers: int) -> Any:
        template = next(Path(folder).glob("chat_template.jinja")).read_text()
        processor = MllamaProcessor(
            MllamaImageProcessor.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
            chat_template=template,
        )
        lines = Path(folder, "train.jsonl").read_text().splitlines()
        conversations = [json.loads(line)["messages"] for line in lines]

        def collate(batch: list[Any]) -> Any:
            names = [messages[0]["content"][0]["image_url"]["url"] for messages in batch]
            images = [[Image.open(Path(folder, name))] for name in names]
            texts = [processor.apply_chat_template(_parts(messages)) for messages in batch]
            inputs = processor(
                images=images,
                text=texts,
                add_special_tokens=False,
                padding="max_length",
                max_length=LENGTH,
                return_tensors="pt",
            )
            is_picture = inputs["input_ids"] == processor.image_token_id
            hidden = is_picture | (inputs["attention_mask"] == 0)
            inputs["labels"] = inputs["input_ids"].masked_fill(hidden, -100)
            return inputs

        def forever() -> Any:
            while True:
                yield from torch.utils.data.DataLoader(
                    conversations,
                    batch_size=BATCH_SIZE,
                    shuffle=True,
                    drop_last=True,
                    num_workers=workers,
                    collate_fn=collate,
                )

        return forever()

    def batches(folder: str, workers: int, **_: Any) -> dict[str, Any]:
        return _rate(opened(folder, workers), lambda batch: batch)

    return {"batches": batches}


def _parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As transformers' templates want them."""
    [first, answer] = messages
    content = [{"type": "image"}, first["content"][1]]
    return [{"role": "user", "content": content}, answer]


def _rate(batches: Any, arrays: Any) -> dict[str, Any]:
    """Conversations a second, when the reading ahead of the first ones is over."""
    for _ in range(BATCHES // 2):
        next(batches)
    started = clock()
    for _ in range(BATCHES):
        batch = next(batches)
    seconds = clock() - started
    shapes = {name: list(x.shape) for name, x in arrays(batch).items()}
    return {"rate": BATCHES * BATCH_SIZE / seconds, "shapes": shapes}


SIDES = {"ours": ours_side, "peer": peer_side}


def measure(folder: Path, cores: int, repeats: int, peer_python: str | None) -> Report:
    report = Report("Training batches, against PyTorch's DataLoader and transformers")
    for number in range(1, cores + 1):
        settings: dict[str, Any] = {"cores": number, "folder": str(folder), "workers": number}
        ours = Side(__file__, "ours", **settings)
        peer = Side(__file__, "peer", python=peer_python, **settings)
        found = [[side.ask("batches") for side in (ours, peer)] for _ in range(repeats)]
        for here, there in found:
            common = here.values["shapes"].keys() & there.values["shapes"].keys()
            assert {"input_ids", "pixel_values", "labels"} <= common
            for name in common:
                assert here.values["shapes"][name] == there.values["shapes"][name], name
        rates = [[turn[side].values["rate"] for turn in found] for side in range(2)]
        plural = "s" if number > 1 else ""
        subject = f"{number} core{plural}, conversations with one picture"
        report.rows.append(against_peer(subject, "1/s", *rates, aim=AIM))
        peaks = [gibibytes([turn[side] for turn in found]) for side in range(2)]
        report.notes.append(f"{number} core{plural}: peak memory {peaks[0]} here, {peaks[1]} there")
        versions = peer.versions()
        for side in (ours, peer):
            side.close()
    report.notes.append(f"the peer: {versions}")
    report.notes.append("there: as many worker processes as cores, whose memory is not counted")
    return report


def main() -> None:
    options = parser(__doc__.splitlines()[0], "data_pipeline")
    add_peer_python(options)
    options.add_argument("--cache", type=Path, default=CACHE)
    arguments = arguments_of(options)
    if arguments.serve:
        serve(SIDES[arguments.serve](), arguments.cores)
        return
    repeats = 1 if arguments.quick else arguments.repeats
    folder = write_data(arguments.cache)
    report = measure(folder, arguments.cores, repeats, arguments.peer_python)
    report.write(arguments.output, arguments.cores)


if __name__ == "__main__":
    main()
