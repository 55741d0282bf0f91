"""What `test_mesh_step.py` runs on eight devices in a process of its own: see `processes.py`."""

import json
import math
import sys
from typing import Any

import jax
import numpy as np
from test_load_onto_mesh import TEXT, VISION
from tiny_model import make_inputs, random_params

import mllama_jax as mj
from mllama_jax.sharding import param_shardings, parse_mesh, place
from mllama_jax.train.settings import (
    ComponentConfig,
    LoraConfig,
    OptimizerConfig,
    Recipe,
    TrainedConfig,
)
from mllama_jax.train.step import TrainState, start, train_step

CONFIG = mj.MllamaConfig(
    {**VISION, "num_hidden_layers": 2, "num_global_layers": 1}
    | {"intermediate_layers_indices": [0], "vision_output_dim": 80},
    {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    image_token_index=64,
)
# An eps that rounding of tiny gradients can't pass.
SETTINGS = OptimizerConfig(learning_rate=1e-2, eps=1e-3)
STEPS = 3
ALL = Recipe(STEPS, SETTINGS, TrainedConfig("all"))
LORA = Recipe(
    *(STEPS, SETTINGS, TrainedConfig("lora", vision_local=ComponentConfig("lora"))),
    LoraConfig(rank=2, targets=("language_model/*_proj", "vision_model/*fc2")),
)


def make_batch() -> dict[str, np.ndarray]:
    """Eight samples, half of the labels of which are learned."""
    images = [[(1, 2)], [], [(0, 3), (4, 1)], [(2, 1)], [], [(3, 3)], [(1, 1), (2, 2)], []]
    batch = make_inputs(images, list(range(5, 13)))
    learned = (batch["attention_mask"] == 1) & (batch["input_ids"] % 2 == 0)
    return {**batch, "labels": np.where(learned, batch["input_ids"], -100)}


def run(written: str | None, recipe: Recipe) -> tuple[TrainState, dict[str, Any]]:
    """Some steps from the same start; the state behind them, and what the compiler made of it."""
    mesh = parse_mesh(written) if written else None
    model = mj.MllamaForConditionalGeneration(CONFIG, remat="full", mesh=mesh, images_at_once=1)
    params = random_params(model)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(model, mesh))
    state, frozen = start(model, params, recipe, 0)
    batch = {
        name: place(x, mesh, "batch", *[None] * (x.ndim - 1)) for name, x in make_batch().items()
    }
    options: Any = {"model": model, "recipe": recipe}
    compiled = train_step.lower(state, batch, frozen, **options).compile()
    results = jax.tree.leaves(compiled.output_shardings[0])
    leaves = jax.tree_util.tree_leaves_with_path(state)
    facts = {
        "moved": [
            jax.tree_util.keystr(path)
            for (path, leaf), result in zip(leaves, results, strict=True)
            if not leaf.sharding.is_equivalent_to(result, leaf.ndim)
        ],
        "taken over": compiled.memory_analysis().alias_size_in_bytes,
        "whole": sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state))),
        "held": sum(map(_held, jax.tree.leaves((state.params, state.opt_state)))),
        "metrics": [],
    }
    for _ in range(STEPS):
        state, metrics = train_step(state, batch, frozen, **options)
        facts["metrics"].append([metrics[name].item() for name in ("loss", "grad_norm", "labels")])
    return state, facts


def _held(x: jax.Array) -> int:
    """Bytes of one device."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def in_bfloat16() -> dict[str, Any]:
    """A step of tiny size on pictures in turns: what moved, and its gradients' errors.

    The gradients are compared with those that the model itself has of float32 parameters.
    """
    settings = OptimizerConfig(learning_rate=1e-6, weight_decay=0.0, max_grad_norm=1e9, eps=1e-12)
    model = mj.MllamaForConditionalGeneration(CONFIG, dtype="bfloat16", images_at_once=1)
    params, batch = random_params(model), make_batch()
    before = jax.tree.map(np.asarray, params)

    def loss(params: Any) -> Any:
        total, count = model.apply({"params": params}, **batch, method="loss")
        return total / count

    expected = jax.jit(jax.grad(loss))(params)
    recipe = Recipe(9, settings, TrainedConfig("all"))
    state, frozen = start(model, params, recipe, 0)
    state, _ = train_step(state, batch, frozen, model=model, recipe=recipe)
    found = jax.tree.map(lambda mu: mu / (1 - settings.b1), state.opt_state[1][0].mu)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, before)
    return {
        "gradients": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs),
        "changes": jax.tree.leaves(changes),
    }


def on_meshes(cases: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Steps on meshes, each with or without adapters, and how far they end from one device's."""
    expected = {is_lora: run(None, LORA if is_lora else ALL) for _, is_lora in cases}
    found = []
    for mesh, is_lora in cases:
        state, facts = run(mesh, LORA if is_lora else ALL)
        whole, facts["expected"] = expected[is_lora]
        facts["errors"] = {
            name: max(
                float(np.abs(np.asarray(a) - np.asarray(b)).max())
                for a, b in zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)
            )
            for name, trees in {
                "params": (state.params, whole.params),
                "moments": (state.opt_state, whole.opt_state),
            }.items()
        }
        found.append(facts)
    return found


if __name__ == "__main__":
    found = {"meshes": on_meshes(json.loads(sys.argv[1])), "bfloat16": in_bfloat16()}
    print(json.dumps(found))
