r"""Asks transformers the held-out questions, one at a time, and counts the answers that are ours.

pip install -e '.[examples,parity]'
python examples/digits/compare.py                                        # the committed model
python examples/digits/compare.py --model runs/digits/lora/model \
    --adapter runs/digits/lora/adapter --data runs/digits/shifted/held_out.jsonl
"""

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import tqdm
import transformers
import tyro
from peft import PeftConfig, PeftModel
from transformers import AutoProcessor

from mllama_jax import MllamaForConditionalGeneration, MllamaProcessor
from mllama_jax.processing.image_loading import load_image
from mllama_jax.train.config import EvaluationConfig
from mllama_jax.train.data.records import Record
from mllama_jax.train.data.sources import read_records
from mllama_jax.train.evaluation import answer_records, chosen


@dataclass(frozen=True)
class Options:
    """Which model, and what to ask it."""

    model: Path = Path(__file__).parent / "model"
    adapter: Path | None = None
    """What transformers loads with PEFT, onto the model that it names, in place of `model`."""
    data: Path = Path("runs/digits/data/held_out.jsonl")
    limit: int | None = None
    """Questions asked, taken evenly from the whole file; all by default."""


def compare(options: Options) -> None:
    """Prints how many answers are the same, and every one that is not."""
    # Asked one at a time, no question shares a batch with others that have more pictures: what a
    # token sees that comes before the first one depends on how many there are in transformers.
    records = sorted(chosen(read_records(options.data), options.limit), key=num_pictures)
    # What a token sees that comes before the first picture: here as transformers has it.
    ours, params = MllamaForConditionalGeneration.from_pretrained(
        options.model, hf_masked_rows=True
    )
    processor = MllamaProcessor.from_pretrained(options.model)
    settings = EvaluationConfig(batch_size=100, max_new_tokens=16)
    answers = [
        answer
        for _, alike in itertools.groupby(records, num_pictures)
        for answer in answer_records(ours, params, processor, list(alike), settings)
    ]
    theirs, their_processor = load_theirs(options)
    num_same = num_right = 0
    for record, answer in zip(tqdm.tqdm(records), answers, strict=True):
        text = ask(theirs, their_processor, record)
        num_same += text == answer.text
        num_right += text == record.answer.strip()
        if text != answer.text:
            tqdm.tqdm.write(f"{record.kind}: here {answer.text!r}, in transformers {text!r}")
    print(f"{num_same} of {len(records)} answers are the same; {num_right} of theirs are right")


def num_pictures(record: Record) -> int:
    return len(record.images)


def load_theirs(options: Options) -> tuple:
    """Model, with the adapter's base below it if there is one, and processor, of transformers."""
    load = transformers.MllamaForConditionalGeneration.from_pretrained
    their_processor = AutoProcessor.from_pretrained(options.model)
    if options.adapter is None:
        return load(options.model, attn_implementation="eager"), their_processor
    base = PeftConfig.from_pretrained(options.adapter).base_model_name_or_path
    model = load(base, attn_implementation="eager")
    return PeftModel.from_pretrained(model, options.adapter), their_processor


def ask(model: torch.nn.Module, processor: AutoProcessor, record: Record) -> str:
    """Its greedy answer."""
    prompt = processor.apply_chat_template(list(record.question), add_generation_prompt=True)
    images = [load_image(path) for path in record.images]
    inputs = processor(
        images=images or None, text=prompt, add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generated = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    new = generated[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


if __name__ == "__main__":
    compare(tyro.cli(Options, description=__doc__))
