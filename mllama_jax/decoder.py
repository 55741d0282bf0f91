"""The decoder: Llama's self-attention layers with gated cross-attention layers between them.

Layers are scanned over the repeating unit of the two kinds (`MllamaTextConfig.unit_length`), so
that program size and compile time do not grow with depth.

Source: transformers 4.54.1, modeling_mllama.py: MllamaTextModel; for tokens that may attend to no
image, llama-models 0.3.0, multimodal/model.py: CrossAttentionTransformerBlock.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mllama_jax.attention import attend, attend_with_weights
from mllama_jax.cache import MllamaCache
from mllama_jax.configs import MllamaTextConfig
from mllama_jax.execution import ATTENTION_RESULT, Execution
from mllama_jax.layers import ACTIVATIONS, RMSNorm, gated, logical, projection
from mllama_jax.masks import CausalMask, Mask, TileMask
from mllama_jax.rope import rotate
from mllama_jax.shapes import Array, Bool, Float, Int
from mllama_jax.sharding import constrain


@flax.struct.dataclass
class DecoderInputs:
    """What all layers of one call share.

    Attributes:
      cos, sin: rotary tables, (B or 1, T, 1, H/2) float32.
      mask: of self-attention.
      start: the slot of the first token, int32 scalar.
      cross_attention_states: image features, or None (then cached ones are used).
      cross_mask: which tiles each token may attend to; None for all.
      sees_image_BT: False for the tokens that may attend to no tile; None if there are none.
    """

    cos: Float[Array, "#B T 1 h"]
    sin: Float[Array, "#B T 1 h"]
    mask: CausalMask
    start: Int[Array, ""]
    cross_attention_states: Float[Array, "B V D"] | None
    cross_mask: TileMask | None
    sees_image_BT: Bool[Array, "B T"] | None


class TextMLP(nn.Module):
    config: MllamaTextConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config, execution = self.config, self.execution
        settings: dict[str, Any] = {"std": config.initializer_range, "execution": execution}
        axes = ("embed", "mlp")
        gate = projection(config.intermediate_size, axes, name="gate_proj", **settings)(x)
        up = projection(config.intermediate_size, axes, name="up_proj", **settings)(x)
        x = ACTIVATIONS[config.hidden_act](gate) * up
        x = constrain(x, execution.mesh, "batch", "length", "mlp")
        return projection(config.hidden_size, axes[::-1], name="down_proj", **settings)(x)


class TextAttention(nn.Module):
    """The projections of both kinds of attention; the subclasses say what they attend to."""

    config: MllamaTextConfig
    execution: Execution

    def heads(self, x: Array, name: str) -> Array:
        config = self.config
        count, axis = config.num_key_value_heads, "kv_heads"
        if name == "q":
            count, axis = config.num_attention_heads, "heads"
        x = projection(
            (count, config.head_dim),
            ("embed", axis, "head_dim"),
            name=f"{name}_proj",
            std=config.initializer_range,
            execution=self.execution,
        )(x)
        return constrain(x, self.execution.mesh, "batch", "length", axis, "head_dim")

    def attend(
        self, q: Array, k: Array, v: Array, mask: Mask | None, output_attentions: bool
    ) -> tuple[Array, Array | None]:
        config, execution = self.config, self.execution
        weights = None
        if output_attentions:
            out, weights = attend_with_weights(q, k, v, mask)
        else:
            out = attend(q, k, v, mask, execution.attention, execution.mesh)
            out = checkpoint_name(out, ATTENTION_RESULT)
        out = projection(
            config.hidden_size,
            ("heads", "head_dim", "embed"),
            name="o_proj",
            contract=2,
            std=config.initializer_range,
            execution=execution,
        )(out)
        return out, weights


class SelfAttention(TextAttention):
    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        inputs: DecoderInputs,
        cache: MllamaCache | None,
        layer: Array,
        output_attentions: bool,
    ) -> tuple[Array, MllamaCache | None, Array | None]:
        q = rotate(self.heads(x_BTD, "q"), inputs.cos, inputs.sin)
        k = rotate(self.heads(x_BTD, "k"), inputs.cos, inputs.sin)
        v = self.heads(x_BTD, "v")
        if cache is not None:
            cache = cache.append(layer, inputs.start, k, v)
            k, v = (cached.astype(self.execution.dtype) for cached in cache.read(layer))
        out, weights = self.attend(q, k, v, inputs.mask, output_attentions)
        return out, cache, weights


class CrossAttention(TextAttention):
    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        inputs: DecoderInputs,
        cache: MllamaCache | None,
        layer: Array,
        output_attentions: bool,
    ) -> tuple[Array, MllamaCache | None, Array | None]:
        norm = (self.config.rms_norm_eps, self.execution)
        q = RMSNorm(*norm, name="q_norm")(self.heads(x_BTD, "q"))
        if inputs.cross_attention_states is not None:
            k = RMSNorm(*norm, name="k_norm")(self.heads(inputs.cross_attention_states, "k"))
            v = self.heads(inputs.cross_attention_states, "v")
            if cache is not None:
                cache = cache.write_images(layer, k, v)
        else:
            assert cache is not None
            k, v = (cached.astype(self.execution.dtype) for cached in cache.read_images(layer))
        out, weights = self.attend(q, k, v, inputs.cross_mask, output_attentions)
        return out, cache, weights


class SelfAttentionLayer(nn.Module):
    config: MllamaTextConfig
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        inputs: DecoderInputs,
        cache: MllamaCache | None,
        layer: Array,
        output_attentions: bool,
    ) -> tuple[Array, MllamaCache | None, Array | None]:
        config, execution = self.config, self.execution
        branch = RMSNorm(config.rms_norm_eps, execution, name="input_layernorm")(x_BTD)
        branch, cache, weights = SelfAttention(config, execution, name="self_attn")(
            branch, inputs, cache, layer, output_attentions
        )
        x_BTD = x_BTD + branch
        branch = RMSNorm(config.rms_norm_eps, execution, name="post_attention_layernorm")(x_BTD)
        x_BTD = x_BTD + TextMLP(config, execution, name="mlp")(branch)
        return constrain(x_BTD, execution.mesh, "batch", "length", None), cache, weights


class CrossAttentionLayer(nn.Module):
    config: MllamaTextConfig
    execution: Execution
    hf_masked_rows: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        inputs: DecoderInputs,
        cache: MllamaCache | None,
        layer: Array,
        output_attentions: bool,
    ) -> tuple[Array, MllamaCache | None, Array | None]:
        config, execution = self.config, self.execution
        zeros = logical(jax.nn.initializers.zeros, None)
        attn_gate = self.param("cross_attn_attn_gate", zeros, (1,), execution.param_dtype)
        mlp_gate = self.param("cross_attn_mlp_gate", zeros, (1,), execution.param_dtype)

        branch = RMSNorm(config.rms_norm_eps, execution, name="input_layernorm")(x_BTD)
        branch, cache, weights = CrossAttention(config, execution, name="cross_attn")(
            branch, inputs, cache, layer, output_attentions
        )
        if not self.hf_masked_rows:
            branch = _where_image_seen(branch, inputs)
        x_BTD = x_BTD + gated(branch, attn_gate)
        branch = RMSNorm(config.rms_norm_eps, execution, name="post_attention_layernorm")(x_BTD)
        branch = TextMLP(config, execution, name="mlp")(branch)
        x_BTD = x_BTD + gated(_where_image_seen(branch, inputs), mlp_gate)
        return constrain(x_BTD, execution.mesh, "batch", "length", None), cache, weights


def _where_image_seen(branch_BTD: Array, inputs: DecoderInputs) -> Array:
    if inputs.sees_image_BT is None:
        return branch_BTD
    return jnp.where(inputs.sees_image_BT[..., None], branch_BTD, 0)


class DecoderUnit(nn.Module):
    """The repeating unit of self- and cross-attention layers, as a step of a scan."""

    config: MllamaTextConfig
    execution: Execution
    hf_masked_rows: bool
    with_images: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, carry: tuple[Array, MllamaCache | None], unit: Array, inputs: DecoderInputs
    ) -> tuple[tuple[Array, MllamaCache | None], tuple[tuple[Array, ...], tuple[Array, ...]]]:
        config = self.config
        # 5: output_attentions, counted from the module itself.
        self_layer, cross_layer = (
            self.execution.rematerialised(kind, static_argnums=(5,))
            for kind in (SelfAttentionLayer, CrossAttentionLayer)
        )
        is_cross = [config.is_cross_attention_layer(i) for i in range(config.unit_length)]
        x_BTD, cache = carry
        layer_inputs: list[Array] = []
        attentions: list[Array] = []
        for block, cross in enumerate(is_cross):
            if self.output_hidden_states:
                layer_inputs.append(x_BTD)
            if cross and not self.with_images:
                continue
            name = f"block_{block}"
            if cross:
                layer = cross_layer(config, self.execution, self.hf_masked_rows, name=name)
            else:
                layer = self_layer(config, self.execution, name=name)
            # Its index among the layers of its kind, where the cache keeps its keys and values.
            index = unit * is_cross.count(cross) + is_cross[:block].count(cross)
            x_BTD, cache, weights = layer(x_BTD, inputs, cache, index, self.output_attentions)
            if weights is not None:
                attentions.append(weights)
        return (x_BTD, cache), (tuple(layer_inputs), tuple(attentions))


def unstack_layers(per_block: tuple[Array, ...], num_units: int) -> tuple[Array, ...]:
    """Puts scan outputs, one array (U, ...) for each block of the unit, into layer order."""
    return tuple(stacked[unit] for unit in range(num_units) for stacked in per_block)
