"""The whole model against transformers': logits, loss, states, weights, cache and gradients."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import pytest
import torch
from closeness import assert_close, relative_difference
from hf_reference import Batch, Pair, make_batch, to_torch
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

import mllama_jax as mj
from mllama_jax.outputs import CausalLMOutputWithPast

# Pair, places of the images in each text, lengths, padding side. Images: three, one, none.
CASES: dict[str, tuple[str, list[list[int]], list[int], str]] = {
    "mixed, right": ("aperiodic", [[1, 3, 6], [2], []], [9, 11, 7], "right"),
    "mixed, left": ("aperiodic", [[1, 3, 6], [2], []], [9, 11, 7], "left"),
    "two images, left": ("periodic", [[0, 1], [3, 5]], [6, 8], "left"),
    "text only, left": ("periodic", [[], []], [5, 8], "left"),
    "text only, right": ("aperiodic", [[], []], [5, 8], "right"),
}


@dataclass(frozen=True)
class Case:
    pair: Pair
    batch: Batch
    ours: CausalLMOutputWithPast
    reference: Any

    @property
    def compared(self) -> np.ndarray:
        """Real tokens. What padding gives is nobody's concern, and differs on the left."""
        return self.batch["attention_mask"].astype(bool)


def make(name: str, request: pytest.FixtureRequest) -> tuple[Pair, Batch]:
    pair_name, images, lengths, side = CASES[name]
    pair: Pair = request.getfixturevalue(pair_name)
    return pair, make_batch(pair.config, images, lengths, side, seed=7)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    pair, batch = make(request.param, request)
    with torch.no_grad():
        reference = pair.reference(
            **to_torch(batch), use_cache=True, output_hidden_states=True, output_attentions=True
        )
    return Case(pair, batch, pair.forward(pair.params, batch), reference)


def test_logits_and_loss(case: Case):
    assert_close(case.ours.logits, case.reference.logits, where=case.compared)
    assert_close(case.ours.loss, case.reference.loss)


def test_hidden_states(case: Case):
    states = zip(case.ours.hidden_states, case.reference.hidden_states, strict=True)
    for i, pair in enumerate(states):
        assert_close(*pair, f"hidden_states[{i}]", where=case.compared)


def test_attentions(case: Case):
    weights = zip(case.ours.attentions, case.reference.attentions, strict=True)
    for i, (ours, reference) in enumerate(weights):
        by_token = ours.transpose(0, 2, 1, 3), reference.transpose(1, 2)
        assert_close(*by_token, f"attentions[{i}]", where=case.compared)


def test_cache(case: Case):
    ours = case.ours.past_key_values.to_legacy_cache(case.pair.text_config)
    config = case.pair.text_config
    assert len(ours) == config.num_hidden_layers
    for i, (layer, reference) in enumerate(
        zip(ours, case.reference.past_key_values.layers, strict=True)
    ):
        if reference.keys is None:  # a cross-attention layer without images
            assert layer is None
            continue
        for mine, theirs in zip(layer, (reference.keys, reference.values), strict=True):
            if config.is_cross_attention_layer(i):
                assert_close(mine, theirs, f"layer {i}")
            else:
                by_token = mine.swapaxes(1, 2), theirs.transpose(1, 2)
                assert_close(*by_token, f"layer {i}", where=case.compared)


def reference_gradients(pair: Pair, batch: Batch, folder: Path) -> tuple[Any, Any]:
    """The reference's outputs, and its gradients brought into our tree by our loader."""
    model = copy.deepcopy(pair.reference)
    output = model(**to_torch(batch))
    output.loss.backward()
    for parameter in model.parameters():
        gradient = parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    model.save_pretrained(folder)
    return output, mj.MllamaForConditionalGeneration.from_pretrained(folder)[1]


@pytest.mark.parametrize("name", ["mixed, right", "mixed, left", "two images, left"])
def test_gradients_of_every_parameter(name: str, tmp_path: Path, request: pytest.FixtureRequest):
    pair, batch = make(name, request)
    output, expected = reference_gradients(pair, batch, tmp_path)
    (loss, logits), gradients = pair.loss_and_gradients(pair.params, batch)
    assert_close(loss, output.loss)
    assert_close(logits, output.logits, where=batch["attention_mask"].astype(bool))
    expected = flax.traverse_util.flatten_dict(jax.device_get(expected), sep="/")
    gradients = flax.traverse_util.flatten_dict(jax.device_get(gradients), sep="/")
    assert gradients.keys() == expected.keys()
    for leaf, gradient in gradients.items():
        assert np.any(expected[leaf]), leaf
        assert_close(gradient, expected[leaf], leaf)


def identity_where_no_image_is_seen(reference: torch.nn.Module, mask: torch.Tensor) -> list[Any]:
    """Makes the reference zero the attention of fully masked rows too, as Meta's code does."""
    sees_image = (mask != 0).any(-1).any(-1)[..., None]
    return [
        module.register_forward_hook(lambda *call: (call[-1][0] * sees_image, call[-1][1]))
        for module in reference.modules()
        if isinstance(module, MllamaTextCrossAttention)
    ]


def test_default_semantics(periodic: Pair):
    """Without the switch, tokens that see no image pass cross-attention layers unchanged."""
    batch = make_batch(periodic.config, [[1, 3], []], [8, 6], "right", seed=9)
    model = periodic.model.clone(hf_masked_rows=False)
    ours = jax.jit(model.apply)({"params": periodic.params}, **batch).logits
    with torch.no_grad():
        leaking = periodic.reference(**to_torch(batch)).logits
        hooks = identity_where_no_image_is_seen(
            periodic.reference, torch.from_numpy(batch["cross_attention_mask"])
        )
        expected = periodic.reference(**to_torch(batch)).logits
    for hook in hooks:
        hook.remove()
    assert_close(ours, expected)
    # The switch matters: to the first token of each sample, and to all of the one without images.
    assert relative_difference(ours[0, 0], leaking[0, 0]) > 0.05
    assert all(relative_difference(ours[1, t], leaking[1, t]) > 0.05 for t in range(6))
