"""Asks the model every held-out question and prints how many answers of each kind are right.

python examples/digits/make_data.py        # draws the held-out pictures, among others
python examples/digits/evaluate.py
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mllama_jax import MllamaForConditionalGeneration, MllamaProcessor
from mllama_jax.train.config import EvaluationConfig
from mllama_jax.train.data.sources import read_records
from mllama_jax.train.evaluation import answer_records, scores, table


@dataclass(frozen=True)
class Options:
    """What to ask whom."""

    model: Path = Path(__file__).parent / "model"
    data: Path = Path("runs/digits/data/held_out.jsonl")
    batch_size: int = 100
    show_wrong: bool = False
    """Also print every question that was answered wrongly."""


def evaluate(options: Options) -> None:
    """Prints the table."""
    records = read_records(options.data)
    model, params = MllamaForConditionalGeneration.from_pretrained(options.model)
    processor = MllamaProcessor.from_pretrained(options.model)
    settings = EvaluationConfig(batch_size=options.batch_size, max_new_tokens=16)
    answers = answer_records(model, params, processor, records, settings)
    if options.show_wrong:
        for answer in answers:
            if not answer.is_right:
                asked = f"{answer.record.kind}, {' '.join(answer.record.images)}"
                print(f"{asked}: {answer.text!r}, expected {answer.record.answer!r}")
    print(table(scores(answers)))


if __name__ == "__main__":
    evaluate(tyro.cli(Options, description=__doc__))
