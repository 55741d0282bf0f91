"""Requests about the example model's pictures, and an engine that answers them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import mllama_jax as mj
from mllama_jax.batch.answers import Answer, Failure
from mllama_jax.batch.engine import Engine, EngineOptions
from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.requests import Request, SamplingOptions

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
PICTURES = sorted((EXAMPLE / "demo" / "pictures").glob("*.png"))
OPTIONS = EngineOptions(
    num_slots=3,
    max_length=96,
    max_tiles=8,
    prompt_lengths=(20, 32),
    tile_counts=(8,),
    pictures_at_once=(1,),
    decode_steps=4,
)
GREEDY = SamplingOptions(max_tokens=12, temperature=0.0)
LOADED = mj.MllamaForConditionalGeneration.from_pretrained(EXAMPLE / "model")
PROCESSOR = mj.MllamaProcessor.from_pretrained(EXAMPLE / "model")


def make_engine(**changes: Any) -> Engine:
    sources = PictureSources((EXAMPLE / "demo" / "pictures",))
    return Engine(*LOADED, PROCESSOR, options=replace(OPTIONS, **changes), sources=sources)


def ask(
    name: str, text: str, *pictures: int, options: SamplingOptions = GREEDY, **changes: Any
) -> Request:
    parts = [{"type": "image", "image": PICTURES[picture].name} for picture in pictures]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return Request(name, "chat", (message,), options=replace(options, **changes))


def mixed(count: int, seed: int, **changes: Any) -> list[Request]:
    """Of no, one or two pictures, short and in several chunks, with limits of their own."""
    random = np.random.default_rng(seed)
    return [
        ask(
            f"request-{seed}-{i}",
            "Which digit is this? " * int(random.integers(1, 9)),
            *random.integers(0, len(PICTURES), random.integers(0, 3)).tolist(),
            max_tokens=int(random.integers(1, 14)),
            **changes,
        )
        for i in range(count)
    ]


def answers(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """By custom_id; each exactly once."""
    found: dict[str, Any] = {}
    for result in engine.run(iter(requests)):
        failed = isinstance(result, Failure)
        name = result.custom_id if failed else result.prepared.request.custom_id
        assert name not in found
        found[name] = result
    assert found.keys() == {request.custom_id for request in requests}
    return found


def whole_messages(request: Request) -> list[dict[str, Any]]:
    """A request's messages with the pictures' full paths."""
    [message] = request.messages or ()
    parts = [
        {**part, "image": str(EXAMPLE / "demo" / "pictures" / part["image"])}
        if part["type"] == "image"
        else part
        for part in message["content"]
    ]
    return [{**message, "content": parts}]


def tokens(answer: Answer) -> tuple[int, ...]:
    [choice] = answer.choices
    return choice.token_ids
