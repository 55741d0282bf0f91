"""Training steps against PyTorch: transformers' model under torch's AdamW, step after step."""

import copy
import math
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
from mllama_jax.train.config import OptimizerConfig
from mllama_jax.train.step import init_state, make_optimizer, train_step

STEPS = 5
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


def learning_rate(step: int) -> float:
    """What step number `step`, counted from 0, uses."""
    peak, warmup = SETTINGS.learning_rate, SETTINGS.warmup_steps
    if step < warmup:
        return peak * step / warmup
    lowest = peak * SETTINGS.final_fraction
    progress = (step - warmup) / (STEPS - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2


def reference_steps(
    model: torch.nn.Module, batches: Sequence[Batch]
) -> list[tuple[float, float, float]]:
    """Trains the reference; (loss, gradient norm before clipping, learning rate) of each step."""
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, DECAYED)}
    groups = [
        {
            "params": [p for p in model.parameters() if (id(p) in kernels) == of_kernels],
            "weight_decay": decay,
        }
        for of_kernels, decay in ((True, SETTINGS.weight_decay), (False, 0.0))
    ]
    betas = (SETTINGS.b1, SETTINGS.b2)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=SETTINGS.eps)
    numbers = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
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


def test_five_steps_give_the_losses_and_parameters_of_pytorch(periodic: Pair, tmp_path: Path):
    """Losses 1e-4 relative; what training changed in each parameter, 1e-3 of its largest change."""
    places = [[1, 3], [2, 5]]
    batches = [
        make_batch(periodic.config, places, [8, 7], "right", seed=seed) for seed in range(STEPS)
    ]
    reference = copy.deepcopy(periodic.reference)
    expected = reference_steps(reference, batches)
    assert all(norm > SETTINGS.max_grad_norm for _, norm, _ in expected)

    state = init_state(
        jax.tree.map(jax.numpy.array, periodic.params), make_optimizer(SETTINGS, STEPS), seed=0
    )
    for batch, (loss, norm, rate) in zip(batches, expected, strict=True):
        state, metrics = train_step(
            state, batch, model=periodic.model, config=SETTINGS, steps=STEPS
        )
        assert metrics["loss"].item() == pytest.approx(loss, rel=1e-4)
        assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-3)
        assert metrics["learning_rate"].item() == pytest.approx(rate, rel=1e-6)
        assert metrics["labels"] == (batch["labels"] != -100).sum()
    assert state.step == STEPS

    before, found = flat(periodic.params), flat(state.params)
    trained = our_tree(reference, tmp_path)
    assert found.keys() == trained.keys()
    for name, values in found.items():
        assert_close(values, trained[name], name)
        change, expected_change = values - before[name], trained[name] - before[name]
        assert np.abs(expected_change).max() > 1e-4, name
        difference = np.abs(change - expected_change).max()
        assert difference <= 1e-3 * np.abs(expected_change).max(), (name, difference)
