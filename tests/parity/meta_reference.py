"""Meta's own code with small random weights, and its weights under transformers' names.

The package's model is tensor-parallel: it wants a process group, here of one process.
"""

import functools
import json
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file


def _stubs() -> dict[str, types.ModuleType]:
    """torchvision, which Meta's image transform imports; nothing here uses it."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: types.ModuleType(name) for name in names}
    modules["torchvision"].transforms = modules[names[1]]  # type: ignore[attr-defined]
    modules[names[1]].functional = modules[names[2]]  # type: ignore[attr-defined]
    return modules


@contextmanager
def _stubbed(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    missing = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(missing)
    yield
    for name in missing:
        del sys.modules[name]


with _stubbed(_stubs()):
    from fairscale.nn.model_parallel import initialize
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.multimodal import model as meta

__all__ = [
    "Batch",
    "ModelArgs",
    "meta",
    "process_group",
    "run",
    "save",
    "text_tensors",
    "vision_tensors",
    "whole_model",
]


@contextmanager
def process_group(rank: int = 0, size: int = 1, store: Path | None = None) -> Iterator[None]:
    """Args: store: a file that all of several processes name; it need not exist."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store or f'{folder}/store'}", rank=rank, world_size=size
        )
        initialize.initialize_model_parallel(size)
        yield
        initialize.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def whole_model(params: Mapping[str, Any], vision_width: int, max_seq_len: int) -> Any:
    """Meta's model of text and pictures. Its encoder is 1280 wide unless it is told otherwise."""
    args = ModelArgs(**params, max_seq_len=max_seq_len)
    narrow = functools.partial(meta.VisionEncoder, width=vision_width)
    # The image transform needs torchvision; nothing here uses it.
    transform = mock.Mock()
    with mock.patch.multiple(meta, VisionEncoder=narrow, VariableSizeImageTransform=transform):
        model = meta.CrossAttentionTransformer(args)
    model.vision_model.vision_projection = meta.ColumnParallelLinear(
        6 * vision_width, args.dim, bias=True, init_method=lambda weight: weight
    )
    return model.eval()


@dataclass(frozen=True)
class Batch:
    """Tokens (B, T), pixels (B, M, 4, 3, h, w), arrangements (B, M, 2), and for each sample the
    span of tokens that attends to each of its images."""

    tokens: np.ndarray
    pixels: np.ndarray
    ratios: np.ndarray
    spans: Sequence[Sequence[tuple[int, int]]]

    @property
    def mask(self) -> torch.Tensor:
        """(B, T, M, 4): 0 where a token attends to a tile, Meta's large negative number else."""
        spans = [[list(span) for span in sample] for sample in self.spans]
        return meta._pad_masks(spans, self.ratios.prod(-1).tolist(), self.tokens.shape[1], 4)


def run(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Image features (B, M, 4, P, D) and logits (B, T, W) of Meta's whole model."""
    text, (num_samples, num_tokens) = model.text_model, batch.tokens.shape
    model.setup_cache(num_samples, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        features = model.vision_model(
            torch.from_numpy(batch.pixels), torch.from_numpy(batch.ratios)
        )
        caches = [
            layer.compute_xattn_kv_cache(features.flatten(1, 3))
            for layer in text.cross_attention_layers
        ]
        cross_mask, row_mask = text._get_xattn_mask(
            num_tokens, "cpu", torch.float32, features, batch.mask
        )
        logits = text(
            position_ids=torch.arange(num_tokens),
            h=text.get_partially_trainable_embedding(torch.from_numpy(batch.tokens)),
            xattn_mask=cross_mask,
            full_text_row_masked_out_mask=row_mask,
            xattn_caches=torch.stack(caches),
        )
    return features, logits


# Repeated parts of Meta's names and what transformers calls them; in order.
_VISION_NAMES = {
    "conv1._linear": "patch_embedding",
    "gated_positional_embedding_gate": "gated_positional_embedding.gate",
    "pre_tile_pos_embed": "pre_tile_positional_embedding",
    "post_tile_pos_embed": "post_tile_positional_embedding",
    "ln_pre": "layernorm_pre",
    "ln_post": "layernorm_post",
    "resblocks": "layers",
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
}
_TEXT_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
}

Tensors = dict[str, torch.Tensor]


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def vision_tensors(encoder: torch.nn.Module, config: dict[str, Any]) -> Tensors:
    """The encoder's weights as transformers' `MllamaVisionModel` names and lays them out.

    Meta's tables have an entry for each place in a grid of tiles; transformers' one for each
    aspect-ratio id, which lists the tiles of such an image.
    """
    ratios, num_tiles = config["supported_aspect_ratios"], config["max_num_tiles"]

    def by_ratio(table: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(ratios) + 1, num_tiles, *table.shape[2:])
        for i, (h, w) in enumerate(ratios):
            rows[i + 1, : h * w] = table[:h, :w].flatten(0, 1)
        return rows.flatten(1)

    tensors: Tensors = {}
    for name, value in encoder.state_dict().items():
        if name == "positional_embedding":
            tensors["gated_positional_embedding.embedding"] = value
        elif name == "gated_positional_embedding":
            tensors["gated_positional_embedding.tile_embedding.weight"] = by_ratio(value)
        elif name.endswith("tile_pos_embed.embedding"):
            tensors[_renamed(name, _VISION_NAMES) + ".weight"] = by_ratio(value)
        elif name == "conv1._linear.weight":
            side = config["patch_size"]
            tensors["patch_embedding.weight"] = value.unflatten(1, (-1, side, side))
        else:
            tensors[_renamed(name, _VISION_NAMES)] = value
    return tensors


def text_tensors(decoder: Any) -> Tensors:
    """The decoder's weights as transformers' `MllamaForCausalLM` names and lays them out.

    A cross-attention layer runs before the self-attention layer that Meta fuses it with, and both
    count. Meta rotates neighbouring features; transformers features half a head apart.
    """
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.cat(
            [decoder.tok_embeddings.weight, decoder.learnable_embedding.weight]
        ),
        "model.norm.weight": decoder.norm.weight,
        "lm_head.weight": decoder.output.weight,
    }
    layers: list[tuple[bool, torch.nn.Module]] = []
    for i, layer in enumerate(decoder.layers):
        if i in decoder.fusion_schedule:
            index = decoder.fusion_schedule.index(i)
            layers.append((True, decoder.cross_attention_layers[index]))
        layers.append((False, layer))
    for i, (is_cross, layer) in enumerate(layers):
        for name, value in layer.state_dict().items():
            new = _renamed(name, _TEXT_NAMES)
            if is_cross:
                new = new.replace("self_attn", "cross_attn")
            elif name in ("attention.wq.weight", "attention.wk.weight"):
                pairs = value.unflatten(0, (-1, decoder.head_dim // 2, 2))
                value = pairs.transpose(1, 2).flatten(0, 2)
            tensors[f"model.layers.{i}.{new}"] = value
    return tensors


def save(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """A folder as transformers writes it."""
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")
