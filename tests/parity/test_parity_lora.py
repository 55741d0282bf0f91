"""Adapters in training, against PEFT around transformers' model."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from closeness import assert_close
from hf_reference import Pair, make_batch, to_torch

from mllama_jax.train.adapters_export import save_adapters
from mllama_jax.train.components import joined
from mllama_jax.train.lora import adapters_of, init_adapters, scaled
from mllama_jax.train.settings import (
    ComponentConfig,
    LoraConfig,
    OptimizerConfig,
    Recipe,
    TrainedConfig,
)
from mllama_jax.train.step import start, train_step

STEPS = 10
LORA = LoraConfig(rank=3, alpha=7.0)
# A clip that bites, a decay that shows, and an eps that rounding of tiny gradients can't pass.
SETTINGS = OptimizerConfig(
    learning_rate=2e-3, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5, max_grad_norm=0.5
)
RECIPE = Recipe(STEPS, replace(SETTINGS, schedule="constant"), TrainedConfig("lora"), LORA)
DECODER = r"model\.language_model\.layers\..*_proj"


@pytest.fixture(scope="module")
def reference(periodic: Pair) -> torch.nn.Module:
    """The model with adapters, far from zero, on all projections of the decoder."""
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=DECODER)
    model = peft.get_peft_model(copy.deepcopy(periodic.reference), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def our_tree(pair: Pair, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """PEFT's tensors by the names of ours: every one has a place, and every place is filled."""
    text = pair.text_config
    found = {}
    for path, adapter in adapters_of(pair.model, RECIPE).items():
        *_, block, part, projection = path
        layers = range(int(block.removeprefix("block_")), text.num_hidden_layers, text.unit_length)
        for ours, theirs, shape in (("a", "lora_A", adapter.a), ("b", "lora_B", adapter.b)):
            names = [f"layers.{i}.{part}.{projection}.{theirs}.default.weight" for i in layers]
            taken = [tensors.pop(f"base_model.model.model.language_model.{name}") for name in names]
            # Theirs are (outputs, inputs), with all heads' dimensions in one.
            found[*path, ours] = np.stack([t.detach().numpy().T for t in taken]).reshape(shape)
    assert not tensors
    return flax.traverse_util.unflatten_dict(found)


def test_loss_logits_gradients_and_ten_steps_are_those_of_peft(
    periodic: Pair, reference: torch.nn.Module
):
    batch = make_batch(periodic.config, [[1, 3], [2, 5]], [8, 7], "right", seed=0)
    adapters = our_tree(periodic, trained(reference))
    expected = reference(**to_torch(batch))
    expected.loss.backward()
    gradients = our_tree(periodic, {name: p.grad for name, p in trained(reference).items()})

    def loss(adapters: Any) -> Any:
        variables = {"params": joined(periodic.params, scaled(adapters, LORA))}
        output = periodic.model.apply(variables, **batch, use_cache=False)
        return output.loss, output.logits

    (_, logits), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
    assert_close(logits, expected.logits)
    with torch.no_grad():
        without = periodic.reference(**to_torch(batch)).logits.numpy()
    assert np.abs(without - logits).max() > 0.1 * np.abs(without).max()
    compare(found, gradients, 1e-4)

    parameters = trained(reference).values()
    optimizer = torch.optim.AdamW(
        parameters,
        lr=SETTINGS.learning_rate,
        betas=(SETTINGS.b1, SETTINGS.b2),
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
    )
    state, frozen = start(periodic.model, periodic.params, RECIPE, seed=0)
    state = state.replace(params=jax.tree.map(jnp.array, adapters))
    for _ in range(STEPS):
        optimizer.zero_grad()
        expected = reference(**to_torch(batch))
        expected.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.max_grad_norm).item()
        assert norm > SETTINGS.max_grad_norm
        optimizer.step()
        state, metrics = train_step(state, batch, frozen, model=periodic.model, recipe=RECIPE)
        assert metrics["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-4)
        assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-3)
    after = our_tree(periodic, trained(reference))
    compare(*(jax.tree.map(np.subtract, tree, adapters) for tree in (state.params, after)), 1e-3)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_peft_computes_the_same_with_an_adapter_that_was_written(periodic: Pair, tmp_path: Path):
    """On all projections there are, of every component."""
    batch = make_batch(periodic.config, [[1, 3], [2, 5]], [8, 7], "right", seed=0)
    by_lora = ComponentConfig("lora")
    recipe = replace(RECIPE, trained=TrainedConfig("lora_all", head=by_lora))
    random = np.random.default_rng(2)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape) / 3, x.dtype),
        init_adapters(periodic.model, recipe, jax.random.key(0)),
    )
    save_adapters(tmp_path, periodic.model, adapters, LORA, "some/base")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(periodic.reference), tmp_path)
    with torch.no_grad():
        expected = model(**to_torch(batch)).logits
    variables = {"params": joined(periodic.params, scaled(adapters, LORA))}
    found = periodic.model.apply(variables, **batch, use_cache=False)
    assert_close(found.logits, expected)
    with torch.no_grad():
        without = periodic.reference(**to_torch(batch)).logits
    assert (without - expected).abs().max() > 0.1 * without.abs().max()


def compare(found: Any, expected: Any, tolerance: float) -> None:
    """Within so much of the largest magnitude of each array."""
    found, expected = map(flax.traverse_util.flatten_dict, (found, expected))
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        largest = np.abs(values).max()
        assert largest > 1e-4, path
        difference = np.abs(found[path] - values).max()
        assert difference <= tolerance * largest, (path, difference / largest)
