"""Which part of the model an operation of a compiled program belongs to."""

import re
from collections.abc import Mapping
from typing import Literal

Phase = Literal["forward", "recomputed", "backward"]

COPIES = "copies"
OTHER = "other"

_PARTS: Mapping[str, str] = {
    r"vision_model": "vision encoder",
    r"multi_modal_projector": "projector",
    r"/cross_attn": "decoder cross-attention",
    r"/self_attn": "decoder self-attention",
    r"/mlp": "decoder MLPs",
    r"lm_head": "head",
    r"embed_tokens": "embedding",
    r"language_model/model|block_\d": "decoder, the rest",
    r"language_model|jvp\(": "loss",
    r"^jit\(train_step\)": "optimizer",
    r"^jit\((prefill|decode)\)": "sampling",
}
PARTS: tuple[str, ...] = (*_PARTS.values(), COPIES, OTHER)
"""The parts, in the order in which they are looked for; see also `mllama_jax.flops`.

An operation of `mllama_jax.train.step.train_step` that is of no module and not differentiated is
the optimizer's; one of `mllama_jax.generation.decoding.decode`, sampling.
"""

_PATTERNS = [(re.compile(pattern), part) for pattern, part in _PARTS.items()]


def part_of(op_name: str) -> str:
    """The part, from the path of modules and functions that an operation was traced in."""
    for pattern, part in _PATTERNS:
        if pattern.search(op_name):
            return part
    return OTHER


def phase_of(op_name: str) -> Phase:
    """Whether an operation belongs to the backward pass, or to what it computes once more."""
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"
