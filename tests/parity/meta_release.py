"""A small model in the form of Meta's release, and the same cut and fused as Meta does it."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import meta_reference
import numpy as np
import torch
from fairscale.nn.model_parallel import initialize, layers

VISION_WIDTH = 32
TOKENS = 12
PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 5,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 96,
    "ffn_dim_multiplier": 0.3,
    "multiple_of": 8,
    "norm_eps": 1e-3,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 28,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 2,
}
"""Self-attention layers 1 and 4 have a cross-attention layer before them."""

Tensors = dict[str, torch.Tensor]


def model() -> Any:
    """Meta's model; of several processes, this one's part of it."""
    return meta_reference.whole_model(PARAMS, VISION_WIDTH, TOKENS)


def batch() -> meta_reference.Batch:
    random = np.random.default_rng(8)
    ratios = np.array([[[1, 2], [2, 2]], [[3, 1], [1, 1]], [[1, 4], [2, 1]]])
    real = np.arange(4) < ratios.prod(-1)[..., None]
    size = PARAMS["vision_chunk_size"]
    pixels = random.normal(size=(3, 2, 4, 3, size, size)) * real[..., None, None, None]
    tokens = random.integers(0, PARAMS["vocab_size"] + 8, (3, TOKENS))
    spans = [[(2, 5), (5, -1)], [(0, 7), (4, 9)], [(1, -1), (8, 12)]]
    return meta_reference.Batch(tokens, pixels.astype(np.float32), ratios, spans)


def write(folder: Path, shards: list[Tensors], single: bool = False) -> Path:
    """A folder of Meta's release."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    for number, shard in enumerate(shards):
        name = "consolidated.pth" if single else f"consolidated.{number:02d}.pth"
        torch.save(shard, folder / name)
    return folder


def shapes_of_rank(rank: int, size: int) -> dict[str, torch.Size]:
    """What each tensor's part of one process has for a shape, as Meta's own layers make it."""
    with ExitStack() as patches:
        for module in (initialize, layers):
            for name, value in (
                ("get_model_parallel_world_size", size),
                ("get_model_parallel_rank", rank),
            ):
                patches.enter_context(mock.patch.object(module, name, lambda value=value: value))
        return {name: value.shape for name, value in model().state_dict().items()}


def cut(tensors: Mapping[str, torch.Tensor], size: int) -> list[Tensors]:
    """Tensor-parallel shards: every tensor along the axis on which Meta's layers are shorter."""
    shards = []
    for rank in range(size):
        shapes = shapes_of_rank(rank, size)
        shard = {}
        for name, value in tensors.items():
            axes = [i for i, n in enumerate(shapes[name]) if n != value.shape[i]]
            assert len(axes) <= 1
            shard[name] = value.chunk(size, axes[0])[rank].clone() if axes else value
        shards.append(shard)
    return shards


def fused(shard: Mapping[str, torch.Tensor]) -> Tensors:
    """A shard under the names, and with the matrices, of Meta's fused kernels."""
    found: Tensors = {"text_model.rope.freqs": torch.ones(2)}
    for name, value in shard.items():
        prefix = name.split("attention.w")[0].split("feed_forward")[0]
        is_cross = name.startswith("text_model.cross_attention_layers.")
        rest = name.removeprefix(prefix)
        if not name.startswith(("text_model.layers.", "text_model.cross_attention_layers.")):
            found[name] = value
        elif rest == "attention.wq.weight" and not is_cross:
            found[f"{prefix}attention.wqkv.weight"] = _join(shard, prefix, "attention.w", "qkv")
        elif rest == "attention.wk.weight" and is_cross:
            found[f"{prefix}attention.wkv.weight"] = _join(shard, prefix, "attention.w", "kv")
        elif rest == "feed_forward.w1.weight":
            found[f"{prefix}feed_forward.mlp.fc1_weight"] = _join(
                shard, prefix, "feed_forward.w", "13"
            )
        elif rest == "feed_forward.w2.weight":
            found[f"{prefix}feed_forward.mlp.fc2_weight"] = value
        elif rest not in ("attention.wk.weight", "attention.wv.weight", "feed_forward.w3.weight"):
            found[_fused_norm(name, is_cross)] = value
    return found


def _join(shard: Mapping[str, torch.Tensor], prefix: str, name: str, parts: str) -> torch.Tensor:
    return torch.cat([shard[f"{prefix}{name}{part}.weight"] for part in parts])


def _fused_norm(name: str, is_cross: bool) -> str:
    for old, new in (
        ("attention_norm.weight", f"attention.{'wq' if is_cross else 'wqkv'}.layer_norm_weight"),
        ("ffn_norm.weight", "feed_forward.mlp.layer_norm_weight"),
        ("attention.q_norm", "attention.inner_attention.q_norm"),
        ("attention.k_norm", "attention.inner_attention.k_norm"),
    ):
        name = name.replace(old, new)
    return name
