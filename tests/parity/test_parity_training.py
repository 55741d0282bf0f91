"""Training steps against PyTorch: transformers' model under torch's AdamW, step after step."""

import copy
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import pytest
import torch
from closeness import assert_close
from hf_reference import Batch, Pair, make_batch, to_torch

import mllama_jax as mj
from mllama_jax.train.settings import ComponentConfig, OptimizerConfig, Recipe, TrainedConfig
from mllama_jax.train.step import start, train_step

STEPS = 10
# A clip that bites, a decay that shows, and an eps that rounding of tiny gradients can't pass.
SETTINGS = OptimizerConfig(
    learning_rate=2e-3,
    warmup_steps=2,
    final_fraction=0.25,
    b1=0.8,
    b2=0.9,
    eps=1e-3,
    weight_decay=0.5,
    max_grad_norm=1.5,
)
DECAYED = (torch.nn.Linear, torch.nn.Conv2d)
OWN = {
    "projector": ComponentConfig(learning_rate=5e-3, weight_decay=0.1),
    "vision_gates": ComponentConfig(learning_rate=2e-2),
}
VISION_GATE = re.compile(r"vision_model.*\.gate(_attn|_ffn)?$")


def learning_rate(step: int) -> float:
    """What step number `step`, counted from 0, uses."""
    peak, warmup = SETTINGS.learning_rate, SETTINGS.warmup_steps
    if step < warmup:
        return peak * step / warmup
    lowest = peak * SETTINGS.final_fraction
    progress = (step - warmup) / (STEPS - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2


def reference_steps(
    model: torch.nn.Module, batches: Sequence[Batch], trained: TrainedConfig
) -> list[tuple[float, float, float]]:
    """Trains the reference; (loss, gradient norm before clipping, learning rate) of each step."""
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, DECAYED)}
    crossing = tuple(
        f"model.language_model.layers.{i}."
        for i in model.config.get_text_config().cross_attention_layers
    )
    for name, p in model.named_parameters():
        beside = "vision_model" in name or "multi_modal_projector" in name
        p.requires_grad_(trained.preset == "all" or beside or name.startswith(crossing))
    groups = []
    for name, p in model.named_parameters():
        own = ComponentConfig()
        if "multi_modal_projector" in name:
            own = trained.projector
        elif VISION_GATE.search(name):
            own = trained.vision_gates
        decay = SETTINGS.weight_decay if own.weight_decay is None else own.weight_decay
        factor = (own.learning_rate or SETTINGS.learning_rate) / SETTINGS.learning_rate
        if p.requires_grad:
            decay = decay if id(p) in kernels else 0.0
            groups.append({"params": [p], "weight_decay": decay, "factor": factor})
    betas = (SETTINGS.b1, SETTINGS.b2)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=SETTINGS.eps)
    numbers = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * group["factor"]
        optimizer.zero_grad(set_to_none=False)
        loss = model(**to_torch(batch)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()
        numbers.append((loss.item(), norm.item(), learning_rate(step)))
    return numbers


def our_tree(reference: torch.nn.Module, folder: Path) -> dict[str, np.ndarray]:
    """The reference's parameters by the names of ours."""
    reference.save_pretrained(folder)
    return flat(mj.MllamaForConditionalGeneration.from_pretrained(folder)[1])


def flat(params: Any) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(jax.device_get(params), sep="/")


@pytest.mark.parametrize("trained", [TrainedConfig("all"), TrainedConfig("adapters", **OWN)])
def test_ten_steps_give_the_losses_and_parameters_of_pytorch(
    periodic: Pair, tmp_path: Path, trained: TrainedConfig
):
    """Losses 1e-4 relative; what training changed in each parameter, 1e-3 of its largest change."""
    places = [[1, 3], [2, 5]]
    batches = [
        make_batch(periodic.config, places, [8, 7], "right", seed=seed) for seed in range(STEPS)
    ]
    reference = copy.deepcopy(periodic.reference)
    expected = reference_steps(reference, batches, trained)
    assert all(norm > SETTINGS.max_grad_norm for _, norm, _ in expected)

    recipe = Recipe(STEPS, SETTINGS, trained)
    params = jax.tree.map(jax.numpy.array, periodic.params)
    state, frozen = start(periodic.model, params, recipe, seed=0)
    for batch, (loss, norm, rate) in zip(batches, expected, strict=True):
        state, metrics = train_step(state, batch, frozen, model=periodic.model, recipe=recipe)
        assert metrics["loss"].item() == pytest.approx(loss, rel=1e-4)
        assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-3)
        assert metrics["learning_rate"].item() == pytest.approx(rate, rel=1e-6)
        assert metrics["labels"] == (batch["labels"] != -100).sum()
    assert state.step == STEPS

    before, found, untrained = map(flat, (periodic.params, state.params, frozen))
    after = our_tree(reference, tmp_path)
    assert found.keys() | untrained.keys() == after.keys()
    assert bool(untrained) == (trained.preset != "all")
    for name in untrained:
        assert np.array_equal(after[name], before[name]), name
    for name, values in found.items():
        assert_close(values, after[name], name)
        change, expected_change = values - before[name], after[name] - before[name]
        assert np.abs(expected_change).max() > 1e-4, name
        difference = np.abs(change - expected_change).max()
        assert difference <= 1e-3 * np.abs(expected_change).max(), (name, difference)
