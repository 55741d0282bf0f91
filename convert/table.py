"""The table between Hugging Face tensor names and our parameter tree, read in both directions.

`ROWS` is the table. A row says which tensor of the Hub layout is which leaf of our tree, which of
its axes go where, and, for layers, on which stack of layers it repeats: the `{i}` of a name is the
layer's number; our leaf holds all layers of a stack on its leading axis. The decoder's layers are
stacked per position in the repeating unit: layer i is entry `i // unit_length` of block
`i % unit_length`, the `{j}` of our path.

Axes are written as in `mllama_jax/shapes.py`, and `(N H)` is one axis that holds both, N outermost.
Besides the legend's letters: `rows` embedding rows, `O` channels of the vision output, `h w` the
sides of a patch, 1 an axis of one entry.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mllama_jax.configs import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama_jax.convert.lazy import LazyTensor
from mllama_jax.convert.regrouped import Regrouped, groups, reversed_axes, shape_of

MAPPING_VERSION = 1
"""Raised when the same checkpoint would become other values or another tree."""

Component = Literal["model", "language_model", "text_model", "vision_model"]
Config = MllamaConfig | MllamaTextConfig | MllamaVisionConfig
Stack = Literal["vision", "vision global", "decoder", "decoder self", "decoder cross"]
Path = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table; the fields are explained at the top of this file."""

    hub: str
    ours: str
    axes: str
    stack: Stack | None = None


def _rows(hub: str, ours: str, stack: Stack | None, lines: Iterable[tuple[str, str, str]]):
    """Table lines under a common name and path."""
    return tuple(Row(hub + name, ours + path, axes, stack) for name, path, axes in lines)


_ENCODER_LAYER = (
    ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", "(N H) D -> D N H"),
    ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", "(N H) D -> D N H"),
    ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", "(N H) D -> D N H"),
    ("self_attn.o_proj.weight", "self_attn/o_proj/kernel", "D (N H) -> N H D"),
    ("mlp.fc1.weight", "mlp/fc1/kernel", "F D -> D F"),
    ("mlp.fc1.bias", "mlp/fc1/bias", "F -> F"),
    ("mlp.fc2.weight", "mlp/fc2/kernel", "D F -> F D"),
    ("mlp.fc2.bias", "mlp/fc2/bias", "D -> D"),
    ("input_layernorm.weight", "input_layernorm/scale", "D -> D"),
    ("input_layernorm.bias", "input_layernorm/bias", "D -> D"),
    ("post_attention_layernorm.weight", "post_attention_layernorm/scale", "D -> D"),
    ("post_attention_layernorm.bias", "post_attention_layernorm/bias", "D -> D"),
)
_GLOBAL_ENCODER_LAYER = (
    *_ENCODER_LAYER,
    ("gate_attn", "gate_attn", "1 -> 1"),
    ("gate_ffn", "gate_ffn", "1 -> 1"),
)
_VISION = (
    ("patch_embedding.weight", "patch_embedding/kernel", "D C h w -> h w C D"),
    ("class_embedding", "class_embedding", "D -> D"),
    (
        "gated_positional_embedding.embedding",
        "gated_positional_embedding/embedding",
        "P D -> P D",
    ),
    ("gated_positional_embedding.gate", "gated_positional_embedding/gate", "1 -> 1"),
    (
        "gated_positional_embedding.tile_embedding.weight",
        "gated_positional_embedding/tile_embedding",
        "R (L P D) -> R L P D",
    ),
    (
        "pre_tile_positional_embedding.embedding.weight",
        "pre_tile_positional_embedding/embedding",
        "R (L D) -> R L D",
    ),
    ("pre_tile_positional_embedding.gate", "pre_tile_positional_embedding/gate", "1 -> 1"),
    (
        "post_tile_positional_embedding.embedding.weight",
        "post_tile_positional_embedding/embedding",
        "R (L D) -> R L D",
    ),
    ("post_tile_positional_embedding.gate", "post_tile_positional_embedding/gate", "1 -> 1"),
    ("layernorm_pre.weight", "layernorm_pre/scale", "D -> D"),
    ("layernorm_pre.bias", "layernorm_pre/bias", "D -> D"),
    ("layernorm_post.weight", "layernorm_post/scale", "D -> D"),
    ("layernorm_post.bias", "layernorm_post/bias", "D -> D"),
)
_DECODER_LAYER = (
    ("mlp.gate_proj.weight", "mlp/gate_proj/kernel", "F D -> D F"),
    ("mlp.up_proj.weight", "mlp/up_proj/kernel", "F D -> D F"),
    ("mlp.down_proj.weight", "mlp/down_proj/kernel", "D F -> F D"),
    ("input_layernorm.weight", "input_layernorm/scale", "D -> D"),
    ("post_attention_layernorm.weight", "post_attention_layernorm/scale", "D -> D"),
)
_SELF_ATTENTION = (
    ("self_attn.q_proj.weight", "self_attn/q_proj/kernel", "(N H) D -> D N H"),
    ("self_attn.k_proj.weight", "self_attn/k_proj/kernel", "(K H) D -> D K H"),
    ("self_attn.v_proj.weight", "self_attn/v_proj/kernel", "(K H) D -> D K H"),
    ("self_attn.o_proj.weight", "self_attn/o_proj/kernel", "D (N H) -> N H D"),
)
_CROSS_ATTENTION = (
    ("cross_attn.q_proj.weight", "cross_attn/q_proj/kernel", "(N H) D -> D N H"),
    ("cross_attn.k_proj.weight", "cross_attn/k_proj/kernel", "(K H) D -> D K H"),
    ("cross_attn.v_proj.weight", "cross_attn/v_proj/kernel", "(K H) D -> D K H"),
    ("cross_attn.o_proj.weight", "cross_attn/o_proj/kernel", "D (N H) -> N H D"),
    ("cross_attn.q_norm.weight", "cross_attn/q_norm/scale", "H -> H"),
    ("cross_attn.k_norm.weight", "cross_attn/k_norm/scale", "H -> H"),
    ("cross_attn_attn_gate", "cross_attn_attn_gate", "1 -> 1"),
    ("cross_attn_mlp_gate", "cross_attn_mlp_gate", "1 -> 1"),
)
_HUB_DECODER, _OUR_DECODER = (
    "language_model.model.layers.{i}.",
    "language_model/model/layers/block_{j}/",
)

ROWS: tuple[Row, ...] = (
    *_rows("vision_model.", "vision_model/", None, _VISION),
    *_rows(
        "vision_model.transformer.layers.{i}.",
        "vision_model/transformer/layers/",
        "vision",
        _ENCODER_LAYER,
    ),
    *_rows(
        "vision_model.global_transformer.layers.{i}.",
        "vision_model/global_transformer/layers/",
        "vision global",
        _GLOBAL_ENCODER_LAYER,
    ),
    Row("multi_modal_projector.weight", "multi_modal_projector/kernel", "D O -> O D"),
    Row("multi_modal_projector.bias", "multi_modal_projector/bias", "D -> D"),
    Row(
        "language_model.model.embed_tokens.weight",
        "language_model/model/embed_tokens/embedding",
        "rows D -> rows D",
    ),
    *_rows(_HUB_DECODER, _OUR_DECODER, "decoder self", _SELF_ATTENTION),
    *_rows(_HUB_DECODER, _OUR_DECODER, "decoder cross", _CROSS_ATTENTION),
    *_rows(_HUB_DECODER, _OUR_DECODER, "decoder", _DECODER_LAYER),
    Row("language_model.model.norm.weight", "language_model/model/norm/scale", "D -> D"),
    Row("language_model.lm_head.weight", "language_model/lm_head/kernel", "W D -> D W"),
)


@dataclass(frozen=True)
class Part:
    """What a component is elsewhere.

    Attributes:
        architecture: its class, in transformers and here.
        config: its configuration's class.
        hub: what its names in the Hub layout begin with. Without it they are the names that
            transformers gives the component when it saves it alone.
        ours: what its paths in a whole model's tree begin with; its own tree's lack it.
    """

    architecture: str
    config: type[Config]
    hub: str
    ours: str


COMPONENTS: Mapping[Component, Part] = {
    "model": Part("MllamaForConditionalGeneration", MllamaConfig, "", ""),
    "language_model": Part(
        "MllamaForCausalLM", MllamaTextConfig, "language_model.", "language_model/"
    ),
    "text_model": Part(
        "MllamaTextModel", MllamaTextConfig, "language_model.model.", "language_model/model/"
    ),
    "vision_model": Part("MllamaVisionModel", MllamaVisionConfig, "vision_model.", "vision_model/"),
}

LAYOUTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Hub": (),
    "transformers 4.52 and later, in memory": (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_model.", "model.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
    **{
        f"{part.architecture} saved alone": ((part.hub, ""),)
        for part in COMPONENTS.values()
        if part.hub
    },
}
"""Layouts that are read: how the beginnings of Hub names change. Only the Hub layout is written."""


@dataclass(frozen=True)
class Tensor:
    """One checkpoint tensor and the place of its values in a component's parameter tree.

    Attributes:
        hub: its name in the Hub layout of a whole model.
        saved: its name in a folder that holds this component alone.
        hub_shape: its shape in the checkpoint.
        path: the leaf of the component's tree.
        index: its entry on the leaf's leading axis; None if the leaf is not stacked.
        shape: the shape of its values in our tree, without the leading axis.
        stack_size: the length of the leading axis; None if the leaf is not stacked.
        axes: the row's axes, as `hub -> ours`.
        sizes: the length of every named axis in `axes`.
    """

    hub: str
    saved: str
    hub_shape: tuple[int, ...]
    path: Path
    index: int | None
    shape: tuple[int, ...]
    stack_size: int | None
    axes: str
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of the whole leaf."""
        return self.shape if self.stack_size is None else (self.stack_size, *self.shape)

    def to_ours(self, stored: LazyTensor) -> Regrouped:
        """The checkpoint's tensor in our axes."""
        return Regrouped(stored, self.axes, self.sizes)

    def to_hub(self, values: LazyTensor) -> Regrouped:
        """The inverse of `to_ours`."""
        return Regrouped(values, reversed_axes(self.axes), self.sizes)


def tensors(config: Config, component: Component) -> tuple[Tensor, ...]:
    """Every tensor of a component, in the table's order.

    Args:
        config: the component's own configuration, or that of a whole model.

    Raises:
        ValueError: `component` is not one of `COMPONENTS`.
        TypeError: `config` has no such part.
    """
    if component not in COMPONENTS:
        raise ValueError(f"component={component!r}: expected one of {', '.join(COMPONENTS)}")
    return tuple(_tensors(config, component))


def _tensors(config: Config, component: Component) -> Iterator[Tensor]:
    part = COMPONENTS[component]
    for row in ROWS:
        if not row.hub.startswith(part.hub):
            continue
        sizes = _axis_sizes(row, config)
        hub_axes, our_axes = row.axes.split(" -> ")
        named = tuple((axis, sizes[axis]) for axis in re.findall(r"[A-Za-z]+", hub_axes))
        for layer, block, index, stack_size in _places(row.stack, config):
            hub = row.hub.format(i=layer)
            yield Tensor(
                hub=hub,
                saved=hub.removeprefix(part.hub),
                hub_shape=_shape(hub_axes, sizes),
                path=tuple(row.ours.format(j=block).removeprefix(part.ours).split("/")),
                index=index,
                shape=_shape(our_axes, sizes),
                stack_size=stack_size,
                axes=row.axes,
                sizes=named,
            )


def _places(
    stack: Stack | None, config: Config
) -> list[tuple[int | None, int | None, int | None, int | None]]:
    """(layer, block, entry on the leading axis, its length) of each layer of a stack."""
    if stack is None:
        return [(None, None, None, None)]
    if stack in ("vision", "vision global"):
        vision = vision_config(config)
        count = vision.num_hidden_layers if stack == "vision" else vision.num_global_layers
        return [(i, None, i, count) for i in range(count)]
    text = text_config(config)
    unit_length, num_units = text.unit_length, text.num_units
    return [
        (i, i % unit_length, i // unit_length, num_units)
        for i in range(text.num_hidden_layers)
        if stack == "decoder" or (stack == "decoder cross") == (i in text.cross_attention_layers)
    ]


def _axis_sizes(row: Row, config: Config) -> dict[str, int]:
    if row.hub.startswith("multi_modal_projector."):
        return {
            "D": text_config(config).hidden_size,
            "O": vision_config(config).vision_output_dim,
        }
    if row.hub.startswith("vision_model."):
        vision = vision_config(config)
        return {
            "D": vision.hidden_size,
            "N": vision.num_attention_heads,
            "H": vision.head_dim,
            "F": vision.intermediate_size,
            "C": vision.num_channels,
            "h": vision.patch_size,
            "w": vision.patch_size,
            "P": vision.num_patches,
            "L": vision.max_num_tiles,
            "R": vision.max_aspect_ratio_id + 1,
        }
    text = text_config(config)
    return {
        "D": text.hidden_size,
        "N": text.num_attention_heads,
        "K": text.num_key_value_heads,
        "H": text.head_dim,
        "F": text.intermediate_size,
        "W": text.vocab_size,
        "rows": text.num_embeddings,
    }


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`"(N H) D"` -> the lengths of these axes."""
    return shape_of(groups(axes), {**sizes, "1": 1})


def part_config(config: Config, component: Component) -> Config:
    """A component's own configuration, out of a whole model's if need be.

    Raises:
        TypeError: `config` has no such part.
    """
    if component == "vision_model":
        return vision_config(config)
    if component in ("language_model", "text_model"):
        return text_config(config)
    if not isinstance(config, MllamaConfig):
        raise TypeError(f"expected MllamaConfig, found {type(config).__name__}")
    return config


def text_config(config: Config) -> MllamaTextConfig:
    """The decoder's configuration, out of a whole model's if need be."""
    part = config.text_config if isinstance(config, MllamaConfig) else config
    if not isinstance(part, MllamaTextConfig):
        raise TypeError(f"expected MllamaTextConfig or MllamaConfig, found {type(config).__name__}")
    return part


def vision_config(config: Config) -> MllamaVisionConfig:
    """The vision encoder's configuration, out of a whole model's if need be."""
    part = config.vision_config if isinstance(config, MllamaConfig) else config
    if not isinstance(part, MllamaVisionConfig):
        raise TypeError(
            f"expected MllamaVisionConfig or MllamaConfig, found {type(config).__name__}"
        )
    return part


def spelled(hub: str, layout: str) -> str:
    """What one of `LAYOUTS` calls a tensor of the Hub layout."""
    for old, new in LAYOUTS[layout]:
        if hub.startswith(old):
            return new + hub.removeprefix(old)
    return hub


def spellings(hub: str) -> dict[str, str]:
    """Every name under which a tensor may be stored -> the first layout that calls it so."""
    found: dict[str, str] = {}
    for layout in LAYOUTS:
        found.setdefault(spelled(hub, layout), layout)
    return found


_ROW_BY_SPELLING = {name: row for row in ROWS for name in spellings(row.hub)}


def row_of(name: str) -> Row | None:
    """The table row that a stored name belongs to, in any layout and for any layer number."""
    return _ROW_BY_SPELLING.get(re.sub(r"(?<=\blayers\.)\d+(?=\.)", "{i}", name))
