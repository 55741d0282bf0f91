"""The engine's answers are those that transformers gives to each request alone."""

from typing import Any

import numpy as np
import pytest
import torch
from asking import EXAMPLE, PROCESSOR, answers, make_engine, mixed, tokens, whole_messages
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaForConditionalGeneration,
)


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' model, but that a token which sees no tile is left unchanged."""
    model = MllamaForConditionalGeneration.from_pretrained(
        EXAMPLE / "model", attn_implementation="eager"
    ).eval()
    sees: dict[str, torch.Tensor] = {}

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        sees["image"] = given["full_text_row_masked_out_mask"][:, 0]

    def leave_unchanged(_: Any, __: Any, output: Any) -> Any:
        attended, *rest = output
        return (attended * sees["image"], *rest)

    for layer in model.modules():
        if isinstance(layer, MllamaCrossAttentionDecoderLayer):
            layer.register_forward_pre_hook(note, with_kwargs=True)
            layer.cross_attn.register_forward_hook(leave_unchanged)
    return model


def test_a_mixed_run_of_many(reference: Any):
    requests = mixed(100, seed=0)
    engine = make_engine()
    found = answers(engine, requests)
    lengths = {len(answer.prepared.input_ids) for answer in found.values()}
    assert min(lengths) < 20
    assert max(lengths) > 32  # in two chunks
    for request in requests:
        inputs = PROCESSOR.apply_chat_template(
            whole_messages(request),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
        )
        given = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        limit = request.options.max_tokens
        with torch.no_grad():
            whole = reference.generate(**given, max_new_tokens=limit, do_sample=False)
        expected = whole[0, given["input_ids"].shape[1] :].tolist()
        assert tokens(found[request.custom_id]) == tuple(expected), request
    stats = engine.stats
    assert (stats.done, stats.failed, stats.slots_busy) == (100, 0, 0)
    assert stats.tokens_out == sum(len(tokens(answer)) for answer in found.values())
