"""Training steps beside PyTorch's: transformers under torch's AdamW, and PEFT for adapters.

    python benchmarks/training.py              # three turns
    python benchmarks/training.py --quick
    python benchmarks/training.py --peer-python ENV/bin/python        # with current transformers

Both sides start from the same weights, in float32, and learn from the same batch again and again;
their losses are compared in the same run. PyTorch runs with the fastest of eager and sdpa
attention, compiled or not. A step is loss, gradients, clipping and AdamW.
"""

from functools import cache
from typing import Any

import numpy as np
from harness import (
    Report,
    Result,
    Side,
    add_peer_python,
    against_limit,
    against_peer,
    arguments_of,
    clock,
    gibibytes,
    parser,
    serve,
)
from models import CACHE, model_folder

BATCH_SIZE, LENGTH = 8, 256
RATIO_IDS = (1, 2, 6, 6, 1, 2, 6, 6)
NUM_TILES = (1, 2, 4, 4, 1, 2, 4, 4)
"""Of each sample's picture: the id of its aspect ratio, and its tiles."""
STEPS = 4
RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-4
TASKS = {"all": "all parameters", "lora": f"adapters of rank {RANK}"}
"""What is trained, by preset."""
AIM, LIMIT_AIM = 1.5, 0.7
WAYS = ("eager", "sdpa", "sdpa compiled")
"""How PyTorch computes."""


def batch_of(size: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Conversations with a picture in front, three quarters of whose tokens are learned."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, vocab_size - 1000, (BATCH_SIZE, LENGTH), np.int32)
    ids[:, 0] = vocab_size  # the picture
    ids[:, 1] = 128000
    labels = np.where(np.arange(LENGTH) < LENGTH // 4, -100, ids)
    has_tile = np.arange(4) < np.array(NUM_TILES)[:, None]
    pixels = rng.standard_normal((BATCH_SIZE, 1, 4, 3, size, size), np.float32)
    sees = np.broadcast_to(has_tile[:, None, None], (BATCH_SIZE, LENGTH, 1, 4))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "labels": labels,
        "pixel_values": pixels * has_tile[:, None, :, None, None, None],
        "aspect_ratio_ids": np.array(RATIO_IDS, np.int32)[:, None],
        "aspect_ratio_mask": has_tile[:, None].astype(np.int32),
        "cross_attention_mask": sees.astype(np.int32),
    }


def ours_side() -> dict[str, Any]:
    import jax

    from mllama_jax import MllamaForConditionalGeneration
    from mllama_jax.train.flops import counts, step_flops
    from mllama_jax.train.settings import LoraConfig, OptimizerConfig, Recipe, TrainedConfig
    from mllama_jax.train.step import start, train_step

    recipes = {
        preset: Recipe(
            steps=1000,
            trained=TrainedConfig(preset=preset),
            lora=LoraConfig(rank=RANK, alpha=ALPHA),
            optimizer=OptimizerConfig(
                learning_rate=LEARNING_RATE, schedule="constant", weight_decay=0.0
            ),
        )
        for preset in TASKS
    }

    @cache
    def opened(folder: str, preset: str) -> list[Any]:
        model, params = MllamaForConditionalGeneration.from_pretrained(folder)
        config = model.config
        batch = batch_of(config.vision_config.image_size, config.text_config.vocab_size)
        state, frozen = start(model, params, recipes[preset], seed=0)
        flops = step_flops(model, recipes[preset]).of(counts(batch, config))
        return [model, state, frozen, jax.device_put(batch), flops]

    def train(folder: str, preset: str, steps: int, **_: Any) -> dict[str, Any]:
        model, state, frozen, batch, flops = held = opened(folder, preset)
        losses = []
        started = clock()
        for _ in range(steps):
            state, metrics = train_step(state, batch, frozen, model=model, recipe=recipes[preset])
            losses.append(metrics["loss"])
        held[1] = state
        found = [float(loss) for loss in losses]
        jax.block_until_ready(state.params)
        return {"seconds": clock() - started, "losses": found, "flops": flops}

    def forget(**_: Any) -> dict[str, Any]:
        opened.cache_clear()
        jax.clear_caches()
        return {}

    return {"train": train, "forget": forget}


def peer_side() -> dict[str, Any]:
    import gc

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MllamaForConditionalGeneration

    @cache
    def opened(folder: str, preset: str, way: str) -> tuple[Any, Any, Any]:
        model = MllamaForConditionalGeneration.from_pretrained(
            folder, attn_implementation=way.split()[0], torch_dtype=torch.float32
        )
        config = model.config
        batch = batch_of(config.vision_config.image_size, config.text_config.vocab_size)
        inputs = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in batch.items()}
        for name in ("input_ids", "labels", "aspect_ratio_ids"):
            inputs[name] = inputs[name].long()
        if preset == "lora":
            targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
            model = get_peft_model(
                model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
            )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        model.train()
        if way.endswith("compiled"):
            model = torch.compile(model)
        return model, optimizer, inputs

    def train(folder: str, preset: str, steps: int, way: str, **_: Any) -> dict[str, Any]:
        model, optimizer, inputs = opened(folder, preset, way)
        losses = []
        started = clock()
        for _ in range(steps):
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return {"seconds": clock() - started, "losses": losses}

    def forget(**_: Any) -> dict[str, Any]:
        opened.cache_clear()
        gc.collect()
        return {}

    return {"train": train, "forget": forget}


def probe_side() -> dict[str, Any]:
    import probe

    return {"probe": probe.probe}


SIDES = {"ours": ours_side, "peer": peer_side, "probe": probe_side}


def measure(folder: str, cores: int, repeats: int, peer_python: str | None) -> Report:
    report = Report("Training steps, against transformers and PEFT", exact=not peer_python)
    for preset, name in TASKS.items():
        # New processes: no side carries what another task left in memory.
        pythons = {"peer": peer_python}
        ours, peer, probe = sides = [
            Side(__file__, side, cores=cores, python=pythons.get(side)) for side in SIDES
        ]
        task = {"folder": folder, "preset": preset}
        way = _fastest(peer, report, **task)
        first = (
            ours.ask("train", steps=STEPS, **task),
            peer.ask("train", steps=STEPS, way=way, **task),
        )
        _check_losses(report, preset, *(result.values["losses"] for result in first))
        found: tuple[list[Result], list[Result]] = ([], [])
        for _ in range(repeats):
            found[0].append(ours.ask("train", steps=STEPS, **task))
            found[1].append(peer.ask("train", steps=STEPS, way=way, **task))
            print(name, *(results[-1].values["seconds"] for results in found), flush=True)
        rates = [
            [STEPS * BATCH_SIZE / result.values["seconds"] for result in results]
            for results in found
        ]
        subject = f"training step, {name}"
        report.rows.append(against_peer(subject, "samples/s", *rates, aim=AIM))
        flops = first[0].values["flops"]
        limits = [max(probe.ask("probe").values["matrix"].values()) / 1e9 for _ in range(repeats)]
        speeds = [rate / BATCH_SIZE * flops / 1e9 for rate in rates[0]]
        report.rows.append(against_limit(subject, "GFLOP/s", speeds, limits, LIMIT_AIM))
        peaks = [gibibytes(results) for results in found]
        report.notes.append(f"{name}: peak memory {peaks[0]} here, {peaks[1]} there ({way})")
        versions = peer.versions()
        for side in sides:
            side.close()
    report.notes.append(f"the peer: {versions}")
    return report


def _check_losses(report: Report, preset: str, ours: list[float], peer: list[float]) -> None:
    """Both sides' first steps; adapters start at random, but without any effect."""
    steps = 1 if preset == "lora" else STEPS
    report.compare(f"losses, {preset}", ours[:steps], peer[:steps], 1e-4, relative=True)
    assert ours[-1] < ours[0]


def _fastest(peer: Side, report: Report, **task: Any) -> str:
    """The way in which PyTorch is fastest; the others are forgotten."""
    seconds = {}
    for way in WAYS:
        peer.ask("train", steps=1, way=way, **task)
        seconds[way] = peer.ask("train", steps=2, way=way, **task).values["seconds"] / 2
        peer.ask("forget")
    report.details[f"seconds a step, {task['preset']}"] = seconds
    return min(seconds, key=lambda way: seconds[way])


def main() -> None:
    options = parser(__doc__.splitlines()[0], "training")
    add_peer_python(options)
    options.add_argument("--cache", default=CACHE)
    arguments = arguments_of(options)
    if arguments.serve:
        serve(SIDES[arguments.serve](), arguments.cores)
        return
    repeats = 1 if arguments.quick else arguments.repeats
    folder = str(model_folder(arguments.cache))
    report = measure(folder, arguments.cores, repeats, arguments.peer_python)
    report.write(arguments.output, arguments.cores)


if __name__ == "__main__":
    main()
