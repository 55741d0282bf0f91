"""The table between Meta's tensor names and axes and the Hub's, read in both directions.

`ROWS` names Meta's tensors as its own model classes do. `{i}` counts a stack of layers: those of
the encoder, or the decoder's self-attention or cross-attention layers, which Meta counts apart.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mllama_jax.configs import MllamaConfig
from mllama_jax.convert import table, tile_grids
from mllama_jax.convert.lazy import Concatenated, LazyTensor, along
from mllama_jax.convert.regrouped import Regrouped, reversed_axes

Change = Literal["none", "rope", "patches", "tiles", "tokens", "image tokens"]
"""How values move: not at all; neighbouring features to features half a head apart; flattened
patches; a grid of tiles to rows by aspect-ratio id; rows of the vocabulary, and those behind it."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        meta: Meta's name.
        hub: the name in the Hub layout.
        split: the axis on which Meta cuts the tensor into tensor-parallel shards; None if every
            shard holds all of it.
        change: between the two layouts.
    """

    meta: str
    hub: str
    split: int | None = None
    change: Change = "none"


def _rows(meta: str, hub: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows under a common beginning of names."""
    return tuple(Row(meta + row.meta, hub + row.hub, row.split, row.change) for row in rows)


_ENCODER_LAYER = (
    Row("attn.wq.weight", "self_attn.q_proj.weight", 0),
    Row("attn.wk.weight", "self_attn.k_proj.weight", 0),
    Row("attn.wv.weight", "self_attn.v_proj.weight", 0),
    Row("attn.wo.weight", "self_attn.o_proj.weight", 1),
    Row("ln_1.weight", "input_layernorm.weight"),
    Row("ln_1.bias", "input_layernorm.bias"),
    Row("mlp.c_fc.weight", "mlp.fc1.weight", 0),
    Row("mlp.c_fc.bias", "mlp.fc1.bias", 0),
    Row("mlp.c_proj.weight", "mlp.fc2.weight", 1),
    Row("mlp.c_proj.bias", "mlp.fc2.bias"),
    Row("ln_2.weight", "post_attention_layernorm.weight"),
    Row("ln_2.bias", "post_attention_layernorm.bias"),
)
_VISION = (
    Row("class_embedding", "class_embedding"),
    Row("positional_embedding", "gated_positional_embedding.embedding"),
    Row(
        "gated_positional_embedding",
        "gated_positional_embedding.tile_embedding.weight",
        change="tiles",
    ),
    Row("gated_positional_embedding_gate", "gated_positional_embedding.gate"),
    Row("conv1._linear.weight", "patch_embedding.weight", 0, "patches"),
    Row("ln_post.weight", "layernorm_post.weight"),
    Row("ln_post.bias", "layernorm_post.bias"),
    Row("ln_pre.weight", "layernorm_pre.weight"),
    Row("ln_pre.bias", "layernorm_pre.bias"),
    *_rows("transformer.resblocks.{i}.", "transformer.layers.{i}.", _ENCODER_LAYER),
    *_rows(
        "global_transformer.resblocks.{i}.",
        "global_transformer.layers.{i}.",
        (Row("gate_attn", "gate_attn"), Row("gate_ffn", "gate_ffn"), *_ENCODER_LAYER),
    ),
    Row(
        "pre_tile_pos_embed.embedding",
        "pre_tile_positional_embedding.embedding.weight",
        change="tiles",
    ),
    Row("pre_tile_pos_embed.gate", "pre_tile_positional_embedding.gate"),
    Row(
        "post_tile_pos_embed.embedding",
        "post_tile_positional_embedding.embedding.weight",
        change="tiles",
    ),
    Row("post_tile_pos_embed.gate", "post_tile_positional_embedding.gate"),
)
_DECODER_LAYER = (
    Row("feed_forward.w1.weight", "mlp.gate_proj.weight", 0),
    Row("feed_forward.w2.weight", "mlp.down_proj.weight", 1),
    Row("feed_forward.w3.weight", "mlp.up_proj.weight", 0),
    Row("attention_norm.weight", "input_layernorm.weight"),
    Row("ffn_norm.weight", "post_attention_layernorm.weight"),
)
_SELF_ATTENTION = (
    Row("attention.wq.weight", "self_attn.q_proj.weight", 0, "rope"),
    Row("attention.wk.weight", "self_attn.k_proj.weight", 0, "rope"),
    Row("attention.wv.weight", "self_attn.v_proj.weight", 0),
    Row("attention.wo.weight", "self_attn.o_proj.weight", 1),
)
_CROSS_ATTENTION = (
    Row("gate_attn", "cross_attn_attn_gate"),
    Row("gate_ffwd", "cross_attn_mlp_gate"),
    Row("attention.wq.weight", "cross_attn.q_proj.weight", 0),
    Row("attention.wk.weight", "cross_attn.k_proj.weight", 0),
    Row("attention.wv.weight", "cross_attn.v_proj.weight", 0),
    Row("attention.wo.weight", "cross_attn.o_proj.weight", 1),
    Row("attention.q_norm.weight", "cross_attn.q_norm.weight"),
    Row("attention.k_norm.weight", "cross_attn.k_norm.weight"),
)
_HUB_LAYER = "language_model.model.layers.{i}."
_EMBEDDINGS = "language_model.model.embed_tokens.weight"

ROWS: tuple[Row, ...] = (
    *_rows("vision_model.vision_encoder.", "vision_model.", _VISION),
    Row("vision_model.vision_projection.weight", "multi_modal_projector.weight", 0),
    Row("vision_model.vision_projection.bias", "multi_modal_projector.bias", 0),
    Row("text_model.tok_embeddings.weight", _EMBEDDINGS, 0, "tokens"),
    Row("text_model.norm.weight", "language_model.model.norm.weight"),
    Row("text_model.output.weight", "language_model.lm_head.weight", 0),
    Row("text_model.learnable_embedding.weight", _EMBEDDINGS, 0, "image tokens"),
    *_rows("text_model.layers.{i}.", _HUB_LAYER, (*_SELF_ATTENTION, *_DECODER_LAYER)),
    *_rows(
        "text_model.cross_attention_layers.{i}.", _HUB_LAYER, (*_CROSS_ATTENTION, *_DECODER_LAYER)
    ),
)


@dataclass(frozen=True)
class MetaTensor:
    """One of Meta's tensors and the Hub's tensor that has its values.

    Attributes:
        meta: its name.
        shape: its shape, of all shards together.
        hub: the Hub's name.
        hub_shape: the Hub tensor's shape.
        split: as in `Row`.
        change: as in `Row`.
    """

    meta: str
    shape: tuple[int, ...]
    hub: str
    hub_shape: tuple[int, ...]
    split: int | None
    change: Change


def meta_tensors(config: MllamaConfig) -> tuple[MetaTensor, ...]:
    """Every tensor of Meta's layout, in the order of Meta's classes."""
    hub_shapes = {tensor.hub: tensor.hub_shape for tensor in table.tensors(config, "model")}
    return tuple(
        MetaTensor(
            meta=row.meta.format(i=i),
            shape=_meta_shape(row.change, hub_shapes[row.hub.format(i=layer)], config),
            hub=row.hub.format(i=layer),
            hub_shape=hub_shapes[row.hub.format(i=layer)],
            split=row.split,
            change=row.change,
        )
        for _, rows in itertools.groupby(ROWS, _stack)
        for i, layer, row in _repeated(list(rows), config)
    )


def _stack(row: Row) -> str:
    """The stack of layers that a row repeats on; rows without one are each their own."""
    return row.meta.split("{i}")[0]


def _repeated(rows: Sequence[Row], config: MllamaConfig) -> Iterator[tuple[int, int, Row]]:
    """Rows of one stack, layer by layer: Meta's number of the layer, the Hub's, the row."""
    for i, layer in enumerate(_layers(rows[0].meta, config)):
        for row in rows:
            yield i, layer, row


def _layers(meta: str, config: MllamaConfig) -> Sequence[int]:
    """The Hub's number of each layer of the stack that a row's name belongs to."""
    text, vision = config.text_config, config.vision_config
    if "cross_attention_layers.{i}" in meta:
        return sorted(text.cross_attention_layers)
    if "text_model.layers.{i}" in meta:
        cross = text.cross_attention_layers
        return [i for i in range(text.num_hidden_layers) if i not in cross]
    if "global_transformer.resblocks.{i}" in meta:
        return range(vision.num_global_layers)
    return range(vision.num_hidden_layers if "{i}" in meta else 1)


def _meta_shape(
    change: Change, hub_shape: tuple[int, ...], config: MllamaConfig
) -> tuple[int, ...]:
    if change == "patches":
        return hub_shape[0], math.prod(hub_shape[1:])
    if change == "tiles":
        tiles, width = config.vision_config.max_num_tiles, config.vision_config.hidden_size
        return tiles, tiles, hub_shape[1] // (tiles * width), width
    if change in ("tokens", "image tokens"):
        rows = config.text_config.vocab_size
        return (rows if change == "tokens" else hub_shape[0] - rows), hub_shape[1]
    return hub_shape


def to_hub(config: MllamaConfig, found: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Hub name -> view, of Meta's tensors by name; all are there and of the right shape."""
    tensors: dict[str, LazyTensor] = {}
    for tensor in meta_tensors(config):
        values = found[tensor.meta]
        if tensor.change == "tiles":
            tensors[tensor.hub] = tile_grids.rows_of_grid(values, config.vision_config)
        elif tensor.change in ("tokens", "image tokens"):
            before = (tensors[tensor.hub],) if tensor.hub in tensors else ()
            tensors[tensor.hub] = Concatenated((*before, values), 0)
        else:
            tensors[tensor.hub] = _moved(values, tensor, config, to_hub=True)
    return tensors


def to_meta(
    config: MllamaConfig, found: Mapping[str, LazyTensor], unused: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Meta's name -> view, of the Hub's tensors by name.

    Args:
        unused: as `unused_tiles` gives it; what is absent becomes zeros.
    """
    tensors: dict[str, LazyTensor] = {}
    for tensor in meta_tensors(config):
        values = found[tensor.hub]
        if tensor.change == "tiles":
            tensors[tensor.meta] = tile_grids.grid_of_rows(
                values, config.vision_config, unused.get(tensor.meta)
            )
        elif tensor.change in ("tokens", "image tokens"):
            start = 0 if tensor.change == "tokens" else config.text_config.vocab_size
            tensors[tensor.meta] = along(values, 0, start, start + tensor.shape[0])
        else:
            tensors[tensor.meta] = _moved(values, tensor, config, to_hub=False)
    return tensors


def _moved(
    values: LazyTensor, tensor: MetaTensor, config: MllamaConfig, to_hub: bool
) -> LazyTensor:
    if tensor.change == "none":
        return values
    if tensor.change == "patches":
        width, channels, side, _ = tensor.hub_shape
        axes = "D (C h w) -> D C h w"
        sizes = {"D": width, "C": channels, "h": side, "w": side}
    else:
        # Meta rotates neighbours, (real, imaginary) pairs; the Hub features half a head apart.
        rows, width = tensor.shape
        pairs = config.text_config.head_dim // 2
        axes = "(N H two) D -> (N two H) D"
        sizes = {"N": rows // (2 * pairs), "H": pairs, "two": 2, "D": width}
    return Regrouped(values, axes if to_hub else reversed_axes(axes), tuple(sizes.items()))


def unused_tiles(config: MllamaConfig, found: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Entries of Meta's grids that the Hub has no place for: Meta's name -> `tile_grids.unused`."""
    return {
        tensor.meta: tile_grids.unused(found[tensor.meta], config.vision_config)
        for tensor in meta_tensors(config)
        if tensor.change == "tiles"
    }
