"""The engine's answers are those that transformers gives to each request alone."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import EXAMPLE, GREEDY, PICTURES, PROCESSOR, make_engine, tokens
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaForConditionalGeneration,
)

from mllama_jax.batch.requests import Request

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    """transformers' model, but that a token which sees no tile is left unchanged."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other far longer than they compute
    model = MllamaForConditionalGeneration.from_pretrained(
        EXAMPLE / "model", attn_implementation="eager"
    ).eval()
    sees: dict[str, torch.Tensor] = {}

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        sees["image"] = given["full_text_row_masked_out_mask"][:, 0]

    def leave_unchanged(_: Any, __: Any, output: Any) -> Any:
        attended, *rest = output
        return (attended * sees["image"], *rest)

    for layer in model.modules():
        if isinstance(layer, MllamaCrossAttentionDecoderLayer):
            layer.register_forward_pre_hook(note, with_kwargs=True)
            layer.cross_attn.register_forward_hook(leave_unchanged)
    yield model
    torch.set_num_threads(threads)


def write_requests(count: int, seed: int) -> list[Request]:
    """Completions of 5 to 800 tokens, evenly spread over their logarithm, with 0 to 3 pictures in
    front, as transformers lets tokens before a picture attend to it."""
    draw = np.random.default_rng(seed)
    words = PROCESSOR.tokenizer.encode((ROOT / "LICENSE").read_text(), add_special_tokens=False)
    requests = []
    for number in range(count):
        pictures = draw.integers(0, len(PICTURES), draw.choice(4, p=(0.3, 0.3, 0.2, 0.2)))
        length = round(np.exp(draw.uniform(np.log(5), np.log(800))))
        first = draw.integers(0, len(words) - length)
        text = PROCESSOR.tokenizer.decode(words[first : first + length - len(pictures) - 1])
        requests.append(
            Request(
                f"request {number}",
                "completion",
                prompt="<|image|>" * len(pictures) + "<|begin_of_text|>" + text,
                images=tuple(PICTURES[picture].name for picture in pictures),
                options=replace(GREEDY, max_tokens=int(draw.integers(1, 12))),
            )
        )
    return requests


def arriving(requests: list[Request], seed: int) -> Iterator[Request]:
    """One after the other, at random."""
    draw = np.random.default_rng(seed)
    for request in requests:
        time.sleep(draw.exponential(0.003))
        yield request


def inputs_of(request: Request) -> dict[str, torch.Tensor]:
    """For transformers' model."""
    paths = [str(PICTURES[0].with_name(name)) for name in request.images]
    inputs = PROCESSOR(
        images=[paths] if paths else None, text=[request.prompt], return_tensors="np"
    )
    return {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}


def test_a_mixed_run_of_many(reference: Any):
    requests = write_requests(200, seed=0)
    engine = make_engine(
        max_length=840, max_tiles=12, tile_counts=(12,), prompt_lengths=(32, 256), decode_steps=5
    )
    found = {
        answer.prepared.request.custom_id: answer for answer in engine.run(arriving(requests, 1))
    }
    lengths = {len(answer.prepared.input_ids) for answer in found.values()}
    assert min(lengths) < 9
    assert max(lengths) > 700  # in three chunks
    for request in requests:
        given, limit = inputs_of(request), request.options.max_tokens
        with torch.no_grad():
            whole = reference.generate(**given, max_new_tokens=limit, do_sample=False)
        expected = whole[0, given["input_ids"].shape[1] :].tolist()
        assert tokens(found[request.custom_id]) == tuple(expected), request
    stats = engine.stats
    assert (stats.done, stats.failed, stats.slots_busy) == (200, 0, 0)
    assert stats.tokens_out == sum(len(tokens(answer)) for answer in found.values())
