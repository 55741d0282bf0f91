"""The vision encoder: image tiles in, features for the decoder's cross-attention out.

pixels → patch embedding → tile and position embeddings → local layers over all tiles of an image
jointly → gated global layers → final state and intermediate states, side by side.

Source: transformers 4.54.1, modeling_mllama.py: MllamaVisionModel (agrees with llama-models 0.3.0,
multimodal/model.py: VisionEncoder; later transformers take the wrong intermediate states).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike

from mllama_jax.attention import attend, attend_with_weights
from mllama_jax.configs import MllamaConfig, MllamaVisionConfig
from mllama_jax.execution import Execution
from mllama_jax.layers import (
    ACTIVATIONS,
    gated,
    layer_norm,
    logical,
    projection,
    scan_layers,
)
from mllama_jax.masks import PaddingPairMask
from mllama_jax.outputs import BaseModelOutput
from mllama_jax.pretrained import PretrainedModule
from mllama_jax.shapes import Array, Float, Int
from mllama_jax.sharding import constrain
from mllama_jax.tiles import padding_mask, tiles_of_aspect_ratios

_PATCH_MULTIPLE = 8
_EMBEDDING_NORM_EPSILON = 1e-5  # fixed in the references, whatever ``norm_eps`` says


class VisionAttention(nn.Module):
    config: MllamaVisionConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x_BED: Array, mask: PaddingPairMask, output_attentions: bool
    ) -> tuple[Array, Array | None]:
        config, execution = self.config, self.execution
        settings: dict[str, Any] = {"std": config.initializer_range, "execution": execution}
        q, k, v = (
            projection(
                (config.num_attention_heads, config.head_dim),
                ("vision_embed", "vision_heads", "vision_head_dim"),
                name=f"{name}_proj",
                **settings,
            )(x_BED)
            for name in "qkv"
        )
        heads = ("batch", "length", "vision_heads", "vision_head_dim")
        q, k, v = (constrain(x, execution.mesh, *heads) for x in (q, k, v))
        weights = None
        if output_attentions:
            out, weights = attend_with_weights(q, k, v, mask)
        else:
            out = attend(q, k, v, mask, execution.attention, execution.mesh)
        out = projection(
            config.hidden_size,
            ("vision_heads", "vision_head_dim", "vision_embed"),
            name="o_proj",
            contract=2,
            **settings,
        )(out)
        return out, weights


class VisionMLP(nn.Module):
    config: MllamaVisionConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        settings: dict[str, Any] = {
            "std": config.initializer_range,
            "use_bias": True,
            "execution": self.execution,
        }
        axes = ("vision_embed", "vision_mlp")
        x = projection(config.intermediate_size, axes, name="fc1", **settings)(x)
        x = constrain(x, self.execution.mesh, "batch", "length", "vision_mlp")
        x = ACTIVATIONS[config.hidden_act](x)
        return projection(config.hidden_size, axes[::-1], name="fc2", **settings)(x)


class VisionLayer(nn.Module):
    """One pre-norm encoder layer, as a step of a scan.

    The carry is the state and the kept states: slot i of ``kept`` receives the state that enters
    the layer whose ``slot`` is i; the last slot takes those that nobody asked for.
    """

    config: MllamaVisionConfig
    is_gated: bool
    execution: Execution
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Array | None], slot: Array | None, mask: PaddingPairMask
    ) -> tuple[tuple[Array, Array | None], tuple[Array | None, Array | None]]:
        x_BED, kept = carry
        layer_input = x_BED
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, x_BED, slot, axis=0)
        # The kept states stay outside: a rematerialised part would save them for every layer.
        compute = self.execution.rematerialised(VisionLayer._compute)
        x_BED, weights = compute(self, x_BED, mask)
        return (x_BED, kept), (layer_input if self.output_hidden_states else None, weights)

    def _compute(self, x_BED: Array, mask: PaddingPairMask) -> tuple[Array, Array | None]:
        config, execution = self.config, self.execution

        def gate(name: str, branch: Array) -> Array:
            if not self.is_gated:
                return branch
            initial = logical(jax.nn.initializers.normal(config.initializer_range), None)
            return gated(branch, self.param(name, initial, (1,), execution.param_dtype))

        branch = layer_norm("input_layernorm", config.norm_eps, execution)(x_BED)
        branch, weights = VisionAttention(config, execution, name="self_attn")(
            branch, mask, self.output_attentions
        )
        x_BED = x_BED + gate("gate_attn", branch)
        branch = layer_norm("post_attention_layernorm", config.norm_eps, execution)(x_BED)
        branch = VisionMLP(config, execution, name="mlp")(branch)
        x_BED = x_BED + gate("gate_ffn", branch)
        return constrain(x_BED, execution.mesh, "batch", "length", None), weights


class VisionEncoder(nn.Module):
    """A stack of layers, scanned; can keep the states that enter some of them."""

    config: MllamaVisionConfig
    num_layers: int
    is_gated: bool
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x_BED: Array,
        mask: PaddingPairMask,
        keep: tuple[int, ...] = (),
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Array, Array | None, Any, Any]:
        """Returns the final state, the kept states (len(keep), B, E, D), every layer's input
        (layers, B, E, D) and every layer's weights (layers, B, N, E, E), where asked for."""
        slots = np.full(self.num_layers, len(keep), np.int32)
        slots[list(keep)] = np.arange(len(keep))
        kept = jnp.zeros((len(keep) + 1, *x_BED.shape), x_BED.dtype) if keep else None
        scanned = scan_layers(VisionLayer, self.num_layers)
        (x_BED, kept), (inputs, weights) = scanned(
            self.config,
            self.is_gated,
            self.execution,
            output_hidden_states,
            output_attentions,
            name="layers",
        )((x_BED, kept), jnp.asarray(slots), mask)
        return x_BED, None if kept is None else kept[:-1], inputs, weights


class TileEmbedding(nn.Module):
    """A gated embedding for each tile of an image, chosen by the image's aspect-ratio id."""

    config: MllamaVisionConfig
    execution: Execution

    @nn.compact
    def __call__(self, x_BLPD: Array, one_hot_BR: Array) -> Array:
        config, execution = self.config, self.execution
        shape = (config.max_aspect_ratio_id + 1, config.max_num_tiles, config.hidden_size)
        normal = jax.nn.initializers.normal(config.initializer_range)
        table = self.param(
            "embedding", logical(normal, None, None, "vision_embed"), shape, execution.param_dtype
        )
        gate = self.param(
            "gate", logical(jax.nn.initializers.zeros, None), (1,), execution.param_dtype
        )
        table = table[:, : x_BLPD.shape[1]]
        chosen = _choose("BR,RLD->BLD", one_hot_BR, table, execution)
        return x_BLPD + gated(chosen, gate)[:, :, None]


class PositionEmbedding(nn.Module):
    """Gated mix of one position table for all tiles and one that knows the tile."""

    config: MllamaVisionConfig
    execution: Execution

    @nn.compact
    def __call__(self, x_BLPD: Array, one_hot_BR: Array) -> Array:
        config, execution = self.config, self.execution
        patches = (config.num_patches, config.hidden_size)
        tiles = (config.max_aspect_ratio_id + 1, config.max_num_tiles, *patches)
        normal = jax.nn.initializers.normal(config.initializer_range)
        shared = self.param(
            "embedding", logical(normal, None, "vision_embed"), patches, execution.param_dtype
        )
        by_tile = self.param(
            "tile_embedding",
            logical(normal, None, None, None, "vision_embed"),
            tiles,
            execution.param_dtype,
        )
        gate = self.param(
            "gate", logical(jax.nn.initializers.zeros, None), (1,), execution.param_dtype
        )
        openness = jnp.tanh(gate.astype(jnp.float32))
        shared = _as_stored(((1 - openness) * shared).astype(execution.dtype), execution)
        x_BLPD = x_BLPD + shared
        by_tile = by_tile[:, : x_BLPD.shape[1]]
        chosen = _choose("BR,RLPD->BLPD", one_hot_BR, by_tile, execution)
        return x_BLPD + gated(chosen, gate)


def _choose(pattern: str, one_hot: Array, table: Array, execution: Execution) -> Array:
    """Rows of a table by a one-hot product: a gather from a sharded table compiles for minutes.

    As in `mllama_jax.layers.Embedding`, each device looks up its own columns.
    """
    table = _as_stored(table.astype(execution.dtype), execution)
    chosen = jnp.einsum(
        pattern, one_hot.astype(execution.dtype), table, precision=jax.lax.Precision.HIGHEST
    )
    inner = [None] * (chosen.ndim - 2)
    chosen = constrain(chosen, execution.mesh, "gathered_batch", *inner, "vision_embed")
    return constrain(chosen, execution.mesh, "batch", *inner, None)


def _as_stored(table: Array, execution: Execution) -> Array:
    """A table whose columns, and those of its gradient, are split over the devices that hold it."""
    return constrain(table, execution.mesh, *[None] * (table.ndim - 1), "vision_embed")


class MllamaVisionModel(PretrainedModule):
    """Encodes image tiles; see `__call__`.

    Attributes:
      config: the vision configuration (a full `MllamaConfig` is accepted).
    """

    component = "vision_model"

    @property
    def vision_config(self) -> MllamaVisionConfig:
        config = self.config
        if isinstance(config, MllamaConfig):
            return config.vision_config
        if not isinstance(config, MllamaVisionConfig):
            raise TypeError(f"config is {type(config).__name__}, expected MllamaVisionConfig")
        return config

    def setup(self) -> None:
        config, execution = self.vision_config, self.execution
        normal = jax.nn.initializers.normal(config.initializer_range)
        self.patch_embedding = projection(
            config.hidden_size,
            ("patch_height", "patch_width", "channels", "vision_embed"),
            name=None,
            contract=3,
            std=config.initializer_range,
            execution=execution,
        )
        self.class_embedding = self.param(
            "class_embedding",
            logical(normal, "vision_embed"),
            (config.hidden_size,),
            self.param_dtype,
        )
        self.gated_positional_embedding = PositionEmbedding(config, execution)
        self.pre_tile_positional_embedding = TileEmbedding(config, execution)
        self.post_tile_positional_embedding = TileEmbedding(config, execution)
        self.layernorm_pre = layer_norm(None, _EMBEDDING_NORM_EPSILON, execution)
        self.layernorm_post = layer_norm(None, _EMBEDDING_NORM_EPSILON, execution)
        self.transformer = VisionEncoder(config, config.num_hidden_layers, False, execution)
        self.global_transformer = VisionEncoder(config, config.num_global_layers, True, execution)

    def __call__(
        self,
        pixel_values: Float[Array, "B M L C height width"],
        aspect_ratio_ids: Int[Array, "B M"],
        aspect_ratio_mask: Int[Array, "B M L"] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_tiles: int | None = None,
    ) -> BaseModelOutput | tuple[Array, ...]:
        """Encodes every image of every sample, its tiles jointly.

        Args:
          pixel_values: normalised tiles, (B, M, L, C, image_size, image_size); missing tiles 0.
          aspect_ratio_ids: (B, M), 1-based index into ``supported_aspect_ratios``, 0 "no image".
          aspect_ratio_mask: (B, M, L), 1 for the tiles that exist; made from the ids if None.
          output_attentions, output_hidden_states: also return these (see `BaseModelOutput`).
          return_dict: False returns a tuple.
          num_tiles: compute only the first so many tiles of each image, of which the last one, if
            it is missing, stands for all missing tiles behind it; the result has as many. It is the
            same, in less time, where no image has a real tile that is left out, missing tiles have
            no pixels, and the parameters pass `mllama_jax.tiles.missing_tiles_are_alike`. None
            computes all.

        Returns:
          `BaseModelOutput`; ``last_hidden_state`` is (B, M, L, P, vision_output_dim) in ``dtype``.

        Raises:
          ValueError: a shape disagrees with the configuration or with another argument; states or
            weights of tiles that are not computed are asked for.
        """
        config = self.vision_config
        _check_shapes(config, pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        if aspect_ratio_mask is None:
            aspect_ratio_mask = tiles_of_aspect_ratios(config, aspect_ratio_ids)
        if num_tiles is not None and (output_attentions or output_hidden_states):
            raise ValueError(
                f"num_tiles={num_tiles}: there are no states or weights of the other tiles to "
                "return; leave it out"
            )
        B, M = pixel_values.shape[:2]
        L = config.max_num_tiles if num_tiles is None else num_tiles
        pixel_values, aspect_ratio_mask = pixel_values[:, :, :L], aspect_ratio_mask[:, :, :L]
        ids_B = aspect_ratio_ids.reshape(B * M)
        # As in a table look-up with a padding row, an id outside the table finds nothing.
        one_hot_BR = jax.nn.one_hot(ids_B, config.max_aspect_ratio_id + 1, dtype=self.dtype)

        x_BLPD = self._embed(pixel_values.reshape(B * M, *pixel_values.shape[2:]), one_hot_BR)
        extra = -config.num_patches % _PATCH_MULTIPLE
        x_BLPD = jnp.pad(x_BLPD, ((0, 0), (0, 0), (0, extra), (0, 0)))
        tiles_BL = aspect_ratio_mask.reshape(B * M, L)
        mask = padding_mask(tiles_BL, config.num_patches, extra, config.max_num_tiles)

        x_BED, kept, _, local_weights = self.transformer(
            rearrange(x_BLPD, "B L P D -> B (L P) D"),
            mask,
            keep=config.intermediate_layers_indices,
            output_attentions=bool(output_attentions),
        )
        x_BED = self.layernorm_post(x_BED)
        x_BLPD = rearrange(x_BED, "B (L P) D -> B L P D", L=L)
        x_BLPD = self.post_tile_positional_embedding(x_BLPD, one_hot_BR)
        x_BED, _, global_inputs, global_weights = self.global_transformer(
            rearrange(x_BLPD, "B L P D -> B (L P) D"),
            mask,
            output_hidden_states=bool(output_hidden_states),
            output_attentions=bool(output_attentions),
        )

        features = x_BED
        if kept is not None:
            interleaved = rearrange(kept, "i B E D -> B E (D i)")
            features = jnp.concatenate([x_BED, interleaved], axis=-1)
        features = rearrange(features, "(B M) (L P) D -> B M L P D", B=B, L=L)
        hidden_states = attentions = None
        if output_hidden_states:
            hidden_states = (*(kept if kept is not None else ()), *global_inputs, x_BED)
        if output_attentions:
            attentions = (*local_weights, *global_weights)
        output = BaseModelOutput(features[:, :, :, : config.num_patches], hidden_states, attentions)
        return output.to_tuple() if return_dict is False else output

    def _embed(self, pixels_BLChw: Array, one_hot_BR: Array) -> Array:
        """Pixels to normalised patch states (B, L, P, D), the class token first."""
        config = self.vision_config
        p = config.patch_size
        side = config.image_size // p
        patches = rearrange(
            pixels_BLChw[..., : side * p, : side * p].astype(self.dtype),
            "B L C (i p) (j q) -> B L (i j) p q C",
            p=p,
            q=p,
        )
        x_BLPD = self.patch_embedding(patches)
        x_BLPD = self.pre_tile_positional_embedding(x_BLPD, one_hot_BR)
        class_token = jnp.broadcast_to(
            _as_stored(self.class_embedding.astype(self.dtype), self.execution),
            (*x_BLPD.shape[:2], 1, x_BLPD.shape[3]),
        )
        x_BLPD = jnp.concatenate([class_token, x_BLPD], axis=2)
        x_BLPD = self.gated_positional_embedding(x_BLPD, one_hot_BR)
        return self.layernorm_pre(constrain(x_BLPD, self.mesh, "batch", None, None, None))

    @nn.nowrap
    def dummy_inputs(self) -> dict[str, Array]:
        return dummy_images(self.vision_config, self.dtype)


def dummy_images(config: MllamaVisionConfig, dtype: DTypeLike) -> dict[str, Array]:
    """One blank picture."""
    tile = (config.num_channels, config.image_size, config.image_size)
    return {
        "pixel_values": jnp.zeros((1, 1, config.max_num_tiles, *tile), dtype),
        "aspect_ratio_ids": jnp.ones((1, 1), jnp.int32),
    }


def _check_shapes(
    config: MllamaVisionConfig,
    pixel_values: Array,
    aspect_ratio_ids: Array,
    aspect_ratio_mask: Array | None,
) -> None:
    tile = (config.max_num_tiles, config.num_channels, config.image_size, config.image_size)
    if pixel_values.ndim != 6 or pixel_values.shape[2:] != tile:
        raise ValueError(
            f"pixel_values has shape {pixel_values.shape}, expected (batch, images, "
            f"{', '.join(map(str, tile))}): tiles, channels, height and width of the configuration"
        )
    expected = {"aspect_ratio_ids": (aspect_ratio_ids, pixel_values.shape[:2])}
    if aspect_ratio_mask is not None:
        expected["aspect_ratio_mask"] = (aspect_ratio_mask, pixel_values.shape[:3])
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}, expected {shape} to match pixel_values "
                f"{pixel_values.shape}"
            )
