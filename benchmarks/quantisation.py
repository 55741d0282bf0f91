"""What quantised weights cost in accuracy and save in memory; the tables of docs/quantisation.md.

python examples/digits/make_data.py             # held-out questions, among others
python benchmarks/quantisation.py accuracy      # on the example model and these questions
python benchmarks/quantisation.py accuracy --model DIR --data conversations.jsonl
python benchmarks/quantisation.py memory        # of the released models, computed
python benchmarks/quantisation.py products      # one token by one matrix, on this machine
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

import mllama_jax as mj
from mllama_jax.loss import IGNORED_LABEL
from mllama_jax.plan.models import RELEASED
from mllama_jax.quantisation import LARGEST, is_quantised, num_bytes, product, quantised
from mllama_jax.quantisation_report import compare, weight_errors
from mllama_jax.train.config import DataConfig, EvaluationConfig
from mllama_jax.train.data.records import Record
from mllama_jax.train.data.sources import read_records
from mllama_jax.train.evaluation import answer_records, scores

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(required=True)
    asked = tasks.add_parser("accuracy", help="against the unquantised model")
    asked.add_argument("--model", default=str(DIGITS / "model"), help="folder or hub id")
    asked.add_argument("--data", type=Path, default=Path("runs/digits/data/held_out.jsonl"))
    asked.add_argument("--quantise", nargs="+", choices=sorted(LARGEST), default=[*LARGEST])
    asked.add_argument("--dtype", default="float32", help="of the computation")
    asked.add_argument("--batch-size", type=int, default=50)
    asked.add_argument("--max-new-tokens", type=int, default=16)
    asked.add_argument("--limit", type=int, help="ask so many questions, evenly spread")
    asked.set_defaults(run=accuracy)
    tasks.add_parser("memory", help="of the released models").set_defaults(run=memory)
    timed = tasks.add_parser("products", help="time them")
    timed.add_argument("--rounds", type=int, default=20)
    timed.set_defaults(run=products)
    options = parser.parse_args()
    print("\n".join("| " + " | ".join(map(str, row)) + " |" for row in options.run(options)))


def accuracy(options: argparse.Namespace) -> list[tuple[object, ...]]:
    """Answers and distributions of every kind of quantisation."""
    records = read_records(options.data)
    if options.limit:
        records = records[:: -(-len(records) // options.limit)]
    processor = mj.MllamaProcessor.from_pretrained(options.model)
    load = partial(
        mj.MllamaForConditionalGeneration.from_pretrained, options.model, dtype=options.dtype
    )
    settings = EvaluationConfig(
        batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
    )

    def right(model: Any, params: Any) -> str:
        found = scores(answer_records(model, params, processor, records, settings))[-1]
        return f"{found.right} of {found.asked}"

    plain = load()
    rows: list[tuple[object, ...]] = [
        ("weights", "right answers", "mean KL", "max KL", "same top token", "perplexity", "SQNR"),
        ("---",) * 7,
    ]
    for kind in options.quantise:
        other = load(quantise=kind)
        found = compare(*plain, *other, batches(processor, records, options.batch_size))
        ratios = [x for layers in weight_errors(plain[1], other[1]).values() for x in layers]
        if len(rows) == 2:
            perplexity = f"{found.perplexity:.5f}"
            rows.append((options.dtype, right(*plain), "", "", "", perplexity, ""))
        row = {
            "weights": kind,
            "right answers": right(*other),
            "mean KL": f"{found.mean_kl:.2g}",
            "max KL": f"{found.max_kl:.2g}",
            "same top token": f"{found.top1_agreement:.2%} of {found.tokens}",
            "perplexity": f"{found.quantised_perplexity:.5f}",
            "SQNR": f"{min(ratios):.1f} … {max(ratios):.1f} dB",
        }
        rows.append(tuple(row.values()))
    return rows


def batches(
    processor: Any, records: list[Record], size: int, date: str = DataConfig.date_string
) -> Iterator[dict[str, np.ndarray]]:
    """The conversations, of which the last answers are labels, equally many pictures together."""
    ordered = sorted(records, key=lambda record: len(record.images))
    padded: dict[str, Any] = {"padding": True, "padding_side": "right", "return_tensors": "np"}
    template = partial(processor.apply_chat_template, date_string=date)
    for start in range(0, len(ordered), size):
        chosen = ordered[start : start + size]
        images = [list(record.images) for record in chosen]
        asked = [template(list(record.question), add_generation_prompt=True) for record in chosen]
        answered = [template(list(record.messages)) for record in chosen]
        inputs = processor(images=images, text=answered, pad_to_multiple_of=32, **padded)
        before = processor(images=images, text=asked, **padded)["attention_mask"].sum(1)
        place, ids = np.arange(inputs["input_ids"].shape[1]), inputs["input_ids"]
        is_answer = (inputs["attention_mask"] == 1) & (place >= before[:, None])
        yield {**inputs, "labels": np.where(is_answer, ids, IGNORED_LABEL)}


def memory(_: argparse.Namespace) -> list[tuple[object, ...]]:
    """Bytes of the released models' parameters, by part and by how they are stored."""
    rows: list[tuple[object, ...]] = [
        ("model", "decoder's layers in", "kernels", "their scales", "all else in bfloat16", "total")
    ]
    rows.append(tuple("---" for _ in rows[0]))
    for name, config in RELEASED.items():
        for kind in (None, *LARGEST):
            model = mj.MllamaForConditionalGeneration(
                config, param_dtype=jnp.bfloat16, quantise=kind
            )
            sizes: Counter[str] = Counter()
            shapes = flax.traverse_util.flatten_dict(model.param_shapes())
            for path, leaf in shapes.items():
                part = "kernels" if is_quantised(path) else "else"
                if path[-1] == "scale" and (*path[:-1], "kernel") in shapes:
                    part = "scales"
                sizes[part] += num_bytes(leaf.shape, leaf.dtype)
            parts = [f"{sizes[part] / GB:.2f}" for part in ("kernels", "scales", "else")]
            rows.append((name, kind or "bfloat16", *parts, f"**{sizes.total() / GB:.2f} GB**"))
    return rows


def products(options: argparse.Namespace) -> list[tuple[object, ...]]:
    """One token by eight layers' matrices of 2048 × 8192, the median of rounds that alternate."""
    inputs, outputs, layers = 2048, 8192, 8
    random = np.random.default_rng(0)
    weights = random.normal(size=(layers, inputs, outputs)).astype(np.float32)
    x = jnp.asarray(random.normal(size=(1, inputs)), jnp.float32)
    stored: dict[str, Any] = {"float32": (jnp.asarray(weights),)}
    for kind in LARGEST:
        made = [quantised(layer, kind, 1) for layer in weights]
        stored[kind] = tuple(jnp.asarray(np.stack(part)) for part in zip(*made, strict=True))
    calls = {name: partial(_chain(), x, arrays) for name, arrays in stored.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds + 1):  # the first compiles
        for name, call in calls.items():
            start = time.perf_counter()
            call().block_until_ready()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    rows: list[tuple[object, ...]] = [("weights", "seconds", "times float32's speed")]
    rows.append(("---", "---", "---"))
    for name, median in medians.items():
        rows.append((name, f"{median:.4f}", f"{medians['float32'] / median:.2f}"))
    return rows


def _chain() -> Callable[..., jax.Array]:
    """Layer after layer, as the decoder goes through its stacked weights."""

    def layer(x: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
        if len(arrays) == 1:
            result = x @ arrays[0]
        else:
            result = product(x, *arrays, num_inputs=1, dtype=jnp.float32)
        return result[:, : x.shape[1]] * 0.01, None

    return jax.jit(lambda x, arrays: jax.lax.scan(layer, x, arrays)[0])


if __name__ == "__main__":
    main()
