"""The language model and the decoder alone, with the less common arguments."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from closeness import assert_close
from hf_reference import Pair, make_batch
from transformers.models.mllama.modeling_mllama import (
    MllamaForCausalLM,
    MllamaTextModel,
    _prepare_cross_attention_mask,
)

import mllama_jax as mj

PATCHES = 3  # of the made-up features
RANDOM = np.random.default_rng(2)


def apply(model: Any, params: Any, **inputs: Any) -> Any:
    static = {k: v for k, v in inputs.items() if not isinstance(v, np.ndarray)}
    arrays = {k: v for k, v in inputs.items() if isinstance(v, np.ndarray)}
    run = jax.jit(lambda params, arrays: model.apply({"params": params}, **arrays, **static))
    return run(params, arrays)


@pytest.fixture(scope="module")
def text(aperiodic: Pair) -> dict[str, Any]:
    """Two samples, features of two images, positions with gaps, and the prepared masks."""
    batch = make_batch(aperiodic.config, [[1, 4], [3]], [8, 8], "right", seed=1)
    tiles = batch["cross_attention_mask"]
    states = RANDOM.normal(size=(2 * 2 * 4, PATCHES, 60)).astype(np.float32)
    cross_mask, row_mask = _prepare_cross_attention_mask(
        torch.from_numpy(tiles), PATCHES, torch.float32
    )
    return {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "tiles": tiles,
        "states": states,
        "positions": np.array([[0, 1, 2, 5, 6, 7, 8, 30], [4, 5, 6, 7, 8, 9, 10, 11]]),
        "reference_mask": {
            "cross_attention_mask": cross_mask,
            "full_text_row_masked_out_mask": row_mask,
        },
    }


@pytest.fixture(scope="module")
def causal(aperiodic: Pair) -> tuple[MllamaForCausalLM, mj.MllamaForCausalLM, Any]:
    config = aperiodic.reference.config.text_config
    reference = MllamaForCausalLM._from_config(config, attn_implementation="eager")
    reference.model.load_state_dict(aperiodic.reference.model.language_model.state_dict())
    reference.lm_head.load_state_dict(aperiodic.reference.lm_head.state_dict())
    ours = mj.MllamaForCausalLM.from_pretrained(aperiodic.folder, hf_masked_rows=True)
    return reference.eval(), *ours


def test_language_model_holds_no_vision_parameters(causal: tuple[Any, Any, Any]):
    assert set(causal[2]) == {"model", "lm_head"}


def test_features_positions_and_labels(text: dict[str, Any], causal: tuple[Any, Any, Any]):
    reference, model, params = causal
    with torch.no_grad():
        expected = reference(
            input_ids=torch.from_numpy(text["input_ids"]),
            position_ids=torch.from_numpy(text["positions"]),
            cross_attention_states=torch.from_numpy(text["states"]),
            labels=torch.from_numpy(text["labels"]),
            output_hidden_states=True,
            **text["reference_mask"],
        )
    ours = apply(
        *(model, params),
        input_ids=text["input_ids"],
        position_ids=text["positions"],
        cross_attention_states=text["states"].reshape(2, -1, 60),
        cross_attention_mask=text["tiles"],
        labels=text["labels"],
        output_hidden_states=True,
    )
    assert_close(ours.logits, expected.logits)
    assert_close(ours.loss, expected.loss)
    for pair in zip(ours.hidden_states, expected.hidden_states, strict=True):
        assert_close(*pair)


def test_embeddings_and_last_logits(text: dict[str, Any], causal: tuple[Any, Any, Any]):
    """Given embeddings, features in transformers' shape, and no mask: all tiles are seen."""
    reference, model, params = causal
    embeddings = RANDOM.normal(size=(2, 8, 60)).astype(np.float32)
    with torch.no_grad():
        expected = reference(
            inputs_embeds=torch.from_numpy(embeddings),
            cross_attention_states=torch.from_numpy(text["states"]),
            logits_to_keep=3,
        )
    ours = apply(
        *(model, params),
        inputs_embeds=embeddings,
        cross_attention_states=text["states"],
        num_logits_to_keep=3,
    )
    assert ours.logits.shape == (2, 3, 97)
    assert_close(ours.logits, expected.logits)


def test_text_only(text: dict[str, Any], causal: tuple[Any, Any, Any]):
    reference, model, params = causal
    with torch.no_grad():
        expected = reference(input_ids=torch.from_numpy(text["input_ids"]))
    assert_close(apply(model, params, input_ids=text["input_ids"]).logits, expected.logits)


def test_text_model(text: dict[str, Any], aperiodic: Pair):
    reference: MllamaTextModel = aperiodic.reference.model.language_model
    model, params = mj.MllamaTextModel.from_pretrained(aperiodic.folder, hf_masked_rows=True)
    assert set(params) == {"embed_tokens", "layers", "norm"}
    with torch.no_grad():
        expected = reference(
            input_ids=torch.from_numpy(text["input_ids"]),
            cross_attention_states=torch.from_numpy(text["states"]),
            **text["reference_mask"],
        )
    row_mask = text["reference_mask"]["full_text_row_masked_out_mask"].numpy()
    shared = {"input_ids": text["input_ids"], "cross_attention_states": text["states"]}
    ours = apply(model, params, **shared, cross_attention_mask=text["tiles"])
    assert_close(ours.last_hidden_state, expected.last_hidden_state)

    # The row mask given by hand; the same tokens are masked, and one more.
    row_mask[0, 0, 5] = 0
    with torch.no_grad():
        expected = reference(
            input_ids=torch.from_numpy(text["input_ids"]),
            cross_attention_states=torch.from_numpy(text["states"]),
            cross_attention_mask=text["reference_mask"]["cross_attention_mask"],
            full_text_row_masked_out_mask=torch.from_numpy(row_mask),
        )
    ours = apply(
        *(model, params),
        **shared,
        cross_attention_mask=text["tiles"],
        full_text_row_masked_out_mask=row_mask,
    )
    assert_close(ours.last_hidden_state, expected.last_hidden_state)
