"""Vision encoder, prefill and decoding beside transformers, each alone.

    python benchmarks/generation.py            # three turns
    python benchmarks/generation.py --quick
    python benchmarks/generation.py --peer-python ENV/bin/python   # with current transformers

Both sides load the same weights, in float32, and get the same inputs; what they compute is compared
in the same run: features of pictures within 1e-4 of the largest, tokens exactly. transformers runs
with the attention that is faster of eager and sdpa for the subject at hand. Decoding is what 65 new
tokens take longer than one.
"""

from functools import cache
from typing import Any

import numpy as np
from harness import (
    Report,
    Result,
    Row,
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

PROMPT_LENGTH = 512
NEW_TOKENS = 64
BATCH_SIZES = (1, 8, 32)
ASPECT_RATIOS = {4: 6, 2: 2, 1: 1}
"""Number of tiles: id of an aspect ratio that has as many."""
ATTENTION = ("sdpa", "eager")
AIMS = {"encode": {4: 1.1, 2: 1.6, 1: 2.5}, "prefill": 1.1, "decode": 2.0, "limit": 0.7}


def prompts(batch_size: int, vocab_size: int) -> np.ndarray:
    """(batch_size, PROMPT_LENGTH) int32: random text, a row each."""
    rng = np.random.default_rng(batch_size)
    ids = rng.integers(1000, vocab_size - 1000, (batch_size, PROMPT_LENGTH), np.int32)
    ids[:, 0] = 128000
    return ids


def picture(num_tiles: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel values (1, 1, 4, 3, size, size), aspect ratio id and mask of tiles of one picture."""
    rng = np.random.default_rng(num_tiles)
    pixels = rng.standard_normal((1, 1, 4, 3, size, size), np.float32)
    pixels[:, :, num_tiles:] = 0
    ids = np.full((1, 1), ASPECT_RATIOS[num_tiles], np.int32)
    return pixels, ids, (np.arange(4) < num_tiles)[None, None].astype(np.int32)


def ours_side() -> dict[str, Any]:
    import jax

    from mllama_jax import MllamaForConditionalGeneration
    from mllama_jax.flops import decoder_flops, total
    from mllama_jax.generation.decoding import encode as encoder
    from mllama_jax.tiles import computed_tiles, missing_tiles_are_alike

    @cache
    def loaded(folder: str) -> tuple[Any, Any]:
        return MllamaForConditionalGeneration.from_pretrained(folder)

    def encode(folder: str, num_tiles: int, **_: Any) -> dict[str, Any]:
        model, params = loaded(folder)
        vision = model.config.vision_config
        assert missing_tiles_are_alike(vision, params["vision_model"])
        inputs = picture(num_tiles, vision.image_size)
        computed = computed_tiles(num_tiles, vision.max_num_tiles)
        started = clock()
        features = encoder(model.clone(generation_config=None), params, *inputs, num_tiles=computed)
        jax.block_until_ready(features)
        seconds = clock() - started
        found = np.asarray(features).reshape(-1, features.shape[-1])
        return {"seconds": seconds, "values": found[:: len(found) // 7, ::50].tolist()}

    def generate(folder: str, batch_size: int, new_tokens: int, **_: Any) -> dict[str, Any]:
        model, params = loaded(folder)
        ids = prompts(batch_size, model.text_config.vocab_size)
        started = clock()
        output = model.generate(
            params,
            input_ids=ids,
            attention_mask=np.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        tokens = np.asarray(output.sequences)[:, PROMPT_LENGTH:]
        return {"seconds": clock() - started, "tokens": tokens.tolist()}

    def sizes(folder: str, **_: Any) -> dict[str, Any]:
        """Operations and bytes of each subject."""
        from ours import _vision_work, decoded_weights

        model, params = loaded(folder)
        config = model.config
        text = config.text_config
        head = text.hidden_size // text.num_attention_heads
        layers = text.num_hidden_layers - len(text.cross_attention_layers)
        return {
            "encode": {n: _vision_work(config, computed_tiles(n, 4)) for n in ASPECT_RATIOS},
            "prefill": total(decoder_flops(config, 1, PROMPT_LENGTH, 0, logits=1)),
            "weights": decoded_weights(params),
            "token": 2 * layers * text.num_key_value_heads * head * 4,
        }

    return {"encode": encode, "generate": generate, "sizes": sizes}


def peer_side() -> dict[str, Any]:
    import torch
    from transformers import MllamaForConditionalGeneration

    @cache
    def loaded(folder: str, attention: str) -> Any:
        return MllamaForConditionalGeneration.from_pretrained(
            folder, attn_implementation=attention, torch_dtype=torch.float32
        ).eval()

    def encode(folder: str, num_tiles: int, attention: str, **_: Any) -> dict[str, Any]:
        model = loaded(folder, attention)
        pixels, ids, mask = picture(num_tiles, model.config.vision_config.image_size)
        inputs = [torch.from_numpy(x) for x in (pixels, ids.astype(np.int64), mask)]
        started = clock()
        with torch.inference_mode():
            states = model.model.vision_model(*inputs).last_hidden_state
            features = model.model.multi_modal_projector(states)
        seconds = clock() - started
        found = features.numpy().reshape(-1, features.shape[-1])
        return {"seconds": seconds, "values": found[:: len(found) // 7, ::50].tolist()}

    def generate(
        folder: str, batch_size: int, new_tokens: int, attention: str, **_: Any
    ) -> dict[str, Any]:
        model = loaded(folder, attention)
        ids = torch.from_numpy(prompts(batch_size, model.config.text_config.vocab_size)).long()
        started = clock()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
            )
        tokens = output[:, PROMPT_LENGTH:]
        return {"seconds": clock() - started, "tokens": tokens.tolist()}

    return {"encode": encode, "generate": generate}


def probe_side() -> dict[str, Any]:
    import probe

    return {"probe": probe.probe}


SIDES = {"ours": ours_side, "peer": peer_side, "probe": probe_side}


class Comparison:
    """The three sides, and the report that is being made of them."""

    def __init__(self, folder: str, cores: int, repeats: int, peer_python: str | None):
        self.ours = Side(__file__, "ours", cores=cores, folder=folder)
        self.peer = Side(__file__, "peer", cores=cores, folder=folder, python=peer_python)
        self.probe = Side(__file__, "probe", cores=cores)
        self.sizes = self.ours.ask("sizes").values
        self.repeats = repeats
        title = "Vision encoder, prefill and decoding, against transformers"
        self.report = Report(title, exact=not peer_python)
        self.report.notes.append(f"the peer: {self.peer.versions()}")
        self._peaks: dict[str, list[Result]] = {"ours": [], "peer": []}

    def limits(self, kind: str) -> list[float]:
        return [max(self.probe.ask("probe").values[kind].values()) for _ in range(self.repeats)]

    def turns(self, task: str, **arguments: Any) -> tuple[list[dict], list[dict]]:
        """What each side returns, in turns, after a first time that does not count."""
        faster = self._faster(task, **arguments)
        self.ours.ask(task, **arguments)
        found: tuple[list[dict], list[dict]] = ([], [])
        for _ in range(self.repeats):
            results = self.ours.ask(task, **arguments), self.peer.ask(task, **arguments, **faster)
            for side, result, values in zip(self._peaks, results, found, strict=True):
                self._peaks[side].append(result)
                values.append(result.values)
        print(task, arguments, *([v["seconds"] for v in values] for values in found), flush=True)
        return found

    def _faster(self, task: str, **arguments: Any) -> dict[str, str]:
        seconds = {}
        for attention in ATTENTION:
            self.peer.ask(task, attention=attention, **arguments)
            result = self.peer.ask(task, attention=attention, **arguments)
            seconds[attention] = result.values["seconds"]
        best = min(seconds, key=lambda attention: seconds[attention])
        self.report.details[f"attention of {task} {arguments}"] = seconds
        return {"attention": best}

    def add(self, subject: str, unit: str, rates: tuple[list[float], list[float]], aim: float):
        self.report.rows.append(against_peer(subject, unit, *rates, aim=aim))

    def close(self) -> None:
        for side, results in self._peaks.items():
            self.report.notes.append(f"peak memory, {side}: {gibibytes(results)}")
        for side in (self.ours, self.peer, self.probe):
            side.close()


def encoder(comparison: Comparison) -> None:
    for num_tiles in ASPECT_RATIOS:
        found = comparison.turns("encode", num_tiles=num_tiles)
        ours, peer = (np.array(values[-1]["values"]) for values in found)
        subject = f"vision encoder, {num_tiles} of 4 tiles"
        comparison.report.compare(subject, ours, peer, 1e-4, relative=True)
        rates = tuple([1 / value["seconds"] for value in values] for values in found)
        comparison.add(subject, "pictures/s", rates, AIMS["encode"][num_tiles])
        comparison.report.rows.append(
            _of_limit(comparison, subject, "matrix", "encode", rates[0], str(num_tiles))
        )


def _of_limit(
    comparison: Comparison, subject: str, kind: str, work: str, rates: list[float], key: str = ""
) -> Row:
    """Operations a second against those of the fastest matrix product."""
    size = comparison.sizes[work][key] if key else comparison.sizes[work]
    limits = [limit / 1e9 for limit in comparison.limits(kind)]
    return against_limit(
        subject, "GFLOP/s", [rate * size / 1e9 for rate in rates], limits, AIMS["limit"]
    )


def language(comparison: Comparison, batch_sizes: tuple[int, ...]) -> None:
    for batch_size in batch_sizes:
        first = comparison.turns("generate", batch_size=batch_size, new_tokens=1)
        whole = comparison.turns("generate", batch_size=batch_size, new_tokens=1 + NEW_TOKENS)
        _note_tokens(comparison, batch_size, whole)
        if batch_size == 1:
            rates = tuple([1 / v["seconds"] for v in values] for values in first)
            subject = f"prefill, {PROMPT_LENGTH} tokens"
            comparison.add(subject, "prompts/s", rates, AIMS["prefill"])
            row = _of_limit(comparison, subject, "matrix", "prefill", rates[0])
            comparison.report.rows.append(row)
        seconds = [
            [w["seconds"] - f["seconds"] for w, f in zip(*pair, strict=True)]
            for pair in zip(whole, first, strict=True)
        ]
        rates = tuple([NEW_TOKENS * batch_size / s for s in side] for side in seconds)
        subject = f"decode, {batch_size} rows"
        comparison.add(subject, "new tokens/s", rates, AIMS["decode"])
        sizes = comparison.sizes
        step = sizes["weights"] + batch_size * sizes["token"] * (PROMPT_LENGTH + NEW_TOKENS / 2)
        speeds = [rate / batch_size * step / 1e9 for rate in rates[0]]
        limits = [limit / 1e9 for limit in comparison.limits("bandwidth")]
        comparison.report.rows.append(against_limit(subject, "GB/s", speeds, limits, AIMS["limit"]))


def _note_tokens(comparison: Comparison, batch_size: int, found: Any) -> None:
    ours, peer = (np.array(values[-1]["tokens"]) for values in found)
    same = (ours == peer).all(1).sum()
    comparison.report.notes.append(f"{batch_size} rows: {same} have the same tokens on both sides")


def main() -> None:
    options = parser(__doc__.splitlines()[0], "generation")
    add_peer_python(options)
    options.add_argument("--cache", default=CACHE)
    arguments = arguments_of(options)
    if arguments.serve:
        serve(SIDES[arguments.serve](), arguments.cores)
        return
    repeats = 1 if arguments.quick else arguments.repeats
    comparison = Comparison(
        str(model_folder(arguments.cache)), arguments.cores, repeats, arguments.peer_python
    )
    encoder(comparison)
    language(comparison, BATCH_SIZES[:2] if arguments.quick else BATCH_SIZES)
    comparison.close()
    comparison.report.write(arguments.output, arguments.cores)


if __name__ == "__main__":
    main()
