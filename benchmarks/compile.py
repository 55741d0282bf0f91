"""Time to compile, and size of the program, against depth: flat, as layers are scanned over.

    python benchmarks/compile.py               # 10, 40 and 100 layers

Forward pass with loss, and a training step, of models that differ in their number of layers alone,
a fifth of them with cross-attention as in the released ones. No weights are made.
"""

from typing import Any

from harness import Report, Row, Side, Spread, arguments_of, clock, parser, serve
from models import CONFIG

LAYERS = (10, 40, 100)
LENGTH = 64
"""Tokens of the text."""


def compiled(layers: int, program: str, **_: Any) -> dict[str, Any]:
    """Seconds of tracing and compiling, and the program's size in bytes."""
    import jax
    import jax.numpy as jnp
    from flax.core import meta

    from mllama_jax import MllamaConfig, MllamaForConditionalGeneration
    from mllama_jax.train.settings import Recipe, TrainedConfig
    from mllama_jax.train.step import start, train_step

    jax.clear_caches()
    cross = list(range(3, layers, 5))
    text = {**CONFIG["text_config"], "num_hidden_layers": layers, "cross_attention_layers": cross}
    model = MllamaForConditionalGeneration(MllamaConfig(**{**CONFIG, "text_config": text}))
    inputs: dict[str, Any] = dict(model.dummy_inputs())
    ids = jnp.full((1, LENGTH), inputs["input_ids"][0, 0])
    inputs |= {"input_ids": ids, "labels": ids}
    params = jax.eval_shape(
        lambda key: meta.unbox(model.init(key, **model.dummy_inputs())["params"]),
        jax.random.key(0),
    )
    started = clock()
    if program == "train":
        recipe = Recipe(steps=10, trained=TrainedConfig(preset="all"))
        state, frozen = jax.eval_shape(lambda p: start(model, p, recipe, 0), params)
        lowered = train_step.lower(state, inputs, frozen, model=model, recipe=recipe)
    else:
        loss = jax.jit(lambda p, x: model.apply({"params": p}, **x, method="loss"))
        lowered = loss.lower(params, jax.tree.map(jnp.asarray, inputs))
    executable = lowered.compile()
    return {"seconds": clock() - started, "bytes": len(executable.as_text())}


def main() -> None:
    arguments = arguments_of(parser(__doc__.splitlines()[0], "compile"))
    if arguments.serve:
        serve({"compiled": compiled}, arguments.cores)
        return
    layers = LAYERS[:2] if arguments.quick else LAYERS
    repeats = 1 if arguments.quick else arguments.repeats
    report = Report("Compiling, against depth")
    side = Side(__file__, "ours", cores=arguments.cores)
    for program in ("loss", "train"):
        found: dict[int, list[dict[str, Any]]] = {depth: [] for depth in layers}
        side.ask("compiled", layers=layers[0], program=program)
        for _ in range(repeats):
            for depth in layers:
                found[depth].append(side.ask("compiled", layers=depth, program=program).values)
        for depth, values in found.items():
            name = f"{program}, {depth} layers"
            report.rows.append(Row(name, "s", Spread.of([v["seconds"] for v in values])))
            size = Spread.of([v["bytes"] / 2**20 for v in values])
            report.rows.append(Row(name, "MiB of program text", size))
    side.close()
    report.write(arguments.output, arguments.cores)


if __name__ == "__main__":
    main()
