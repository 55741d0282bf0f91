"""transformers' side of the mixed job: pictures and prompts in batches, as its users run it."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from job import IMAGE, read_job
from PIL import Image
from transformers import MllamaForConditionalGeneration, MllamaProcessor

Record = dict[str, Any]


@cache
def _loaded(folder: str, attention: str) -> tuple[Any, Any]:
    processor = MllamaProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model = MllamaForConditionalGeneration.from_pretrained(
        folder, attn_implementation=attention, torch_dtype=torch.float32
    )
    return processor, model.eval()


def run(
    folder: str,
    job: str,
    ids: list[str] | None = None,
    attention: str = "sdpa",
    batch_size: int = 8,
    sort_by: str = "limit",
) -> dict[str, Any]:
    """Answers all requests; see `batches` for the last two arguments."""
    processor, model = _loaded(folder, attention)
    answers = {}
    for batch in batches(list(read_job(job, ids)), batch_size, sort_by):
        tokens = _generate(processor, model, Path(job).parent, batch)
        for record, row in zip(batch, tokens, strict=True):
            own = _until_end(row[: _limit(record)], model.generation_config.eos_token_id)
            # As the answers of an API: spaces before punctuation stay.
            text = processor.tokenizer.decode(
                own, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            answers[record["custom_id"]] = {"tokens": own, "text": text}
    return {"answers": answers}


def refuses_static_cache(folder: str, job: str, **_: Any) -> dict[str, Any]:
    """What it says when it is asked for a cache of a fixed size."""
    processor, model = _loaded(folder, "sdpa")
    [record] = list(read_job(job))[:1]
    try:
        _generate(processor, model, Path(job).parent, [record], cache_implementation="static")
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def margin(folder: str, job: str, id: str, tokens: list[int], **_: Any) -> dict[str, Any]:
    """How far the likeliest two tokens behind these are apart, in logits.

    Args:
        id: of the request.
        tokens: the beginning of its answer.
    """
    processor, model = _loaded(folder, "eager")
    [record] = read_job(job, [id])
    inputs = _inputs(processor, Path(job).parent, [record])
    own = torch.tensor([tokens], dtype=torch.int64)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], own], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        more = mask[:, -1:].expand(-1, len(tokens), -1, -1)
        inputs["cross_attention_mask"] = torch.cat([mask, more], 1)
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1]
    best = logits.topk(2).values
    return {"margin": float(best[0] - best[1]), "largest": float(best[0])}


def batches(records: list[Record], size: int, sort_by: str) -> Iterator[list[Record]]:
    """Requests with as many pictures each, of like length.

    transformers takes no batch in which only some have pictures, and encodes the places of missing
    ones like pictures.

    Args:
        sort_by: "limit", which saves steps that only some rows need; or "length", of the prompt,
            which saves padding.
    """
    groups: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        groups[len(record["body"].get("images", ()))].append(record)
    key = _limit if sort_by == "limit" else lambda record: len(record["body"]["prompt"])
    for group in groups.values():
        group.sort(key=key)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _limit(record: Record) -> int:
    limit: int = record["body"]["max_tokens"]
    return limit


def _inputs(processor: Any, pictures: Path, batch: list[Record]) -> Any:
    images = [
        [Image.open(pictures / name) for name in record["body"].get("images", ())]
        for record in batch
    ]
    texts = [record["body"]["prompt"] for record in batch]
    assert all(text.count(IMAGE) == len(own) for text, own in zip(texts, images, strict=True))
    return processor(
        images=images if images[0] else None, text=texts, padding=True, return_tensors="pt"
    )


def _generate(
    processor: Any, model: Any, pictures: Path, batch: list[Record], **options: Any
) -> list[list[int]]:
    inputs = _inputs(processor, pictures, batch)
    limit = max(map(_limit, batch))
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False, **options)
    new: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return new


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    found = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: found + 1]


TASKS = {"run": run, "refuses_static_cache": refuses_static_cache, "margin": margin}
