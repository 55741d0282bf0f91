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
from jax.sharding import Mesh

from mllama_jax.attention import attend, attend_with_weights
from mllama_jax.attention.decode import attend_decode
from mllama_jax.attention.step import MAX_STEP, attend_step
from mllama_jax.cache import MllamaCache
from mllama_jax.configs import MllamaTextConfig
from mllama_jax.execution import Execution
from mllama_jax.layers import ACTIVATIONS, RMSNorm, gated, logical, projection
from mllama_jax.masks import CausalMask, Mask, TileMask
from mllama_jax.rope import rotate
from mllama_jax.shapes import Array, Bool, Float, Int
from mllama_jax.sharding import constrain


@flax.struct.dataclass
class DecodeMasks:
    """What one new token may attend to: int32, 0 for slots and image tokens that it may not.

    They are made once for all layers; ``image_tokens_B1V`` covers the cache's rounded length, and
    none of a sample is allowed from ``image_tokens_used_B`` on.
    """

    slots_B1S: Int[Array, "B 1 S"]
    image_tokens_B1V: Int[Array, "B 1 V"] | None
    image_tokens_used_B: Int[Array, "B"] | None


@flax.struct.dataclass
class DecoderInputs:
    """What all layers of one call share.

    Attributes:
      cos, sin: rotary tables, (B or 1, T, 1, H/2) float32.
      mask: of self-attention.
      start: the slot of the first token, int32: a scalar, or (B,) where samples differ.
      cache: of earlier tokens and images, only read here; None if there is none.
      cross_attention_states: image features, or None (then cached ones are used).
      cross_mask: which tiles each token may attend to; None for all.
      decode_masks: of one new token after a cache; None for all other calls.
      sees_image_BT: False for the tokens that may attend to no tile; None if there are none.
    """

    cos: Float[Array, "#B T 1 h"]
    sin: Float[Array, "#B T 1 h"]
    mask: CausalMask
    start: Int[Array, ""] | Int[Array, "B"]
    cache: MllamaCache | None
    cross_attention_states: Float[Array, "B V D"] | None
    cross_mask: TileMask | None
    sees_image_BT: Bool[Array, "B T"] | None
    decode_masks: DecodeMasks | None = None


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
    """The projections of both kinds of attention; the subclasses say what they attend to.

    Their calls return the result, the keys and values that they computed, (B, K, T or V, H) each
    (None where cached ones were used), and the weights, if asked for.
    """

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
        if output_attentions:
            return attend_with_weights(q, k, v, mask)
        return attend(q, k, v, mask, self.execution.attention, self.execution.mesh), None

    def attend_decode(self, q_B1NH: Array, **arguments: Any) -> Array:
        execution = self.execution
        kind, mesh = execution.attention, execution.mesh
        out = attend_decode(q_B1NH[:, 0], **arguments, kind=kind, mesh=mesh)
        return out[:, None].astype(execution.dtype)

    def output(self, attended: Array) -> Array:
        return projection(
            self.config.hidden_size,
            ("heads", "head_dim", "embed"),
            name="o_proj",
            contract=2,
            std=self.config.initializer_range,
            execution=self.execution,
        )(attended)


KeysAndValues = tuple[Array, Array]


class SelfAttention(TextAttention):
    @nn.compact
    def __call__(
        self, x_BTD: Array, inputs: DecoderInputs, layer: Array, output_attentions: bool
    ) -> tuple[Array, KeysAndValues, Array | None]:
        q = rotate(self.heads(x_BTD, "q"), inputs.cos, inputs.sin)
        k = rotate(self.heads(x_BTD, "k"), inputs.cos, inputs.sin)
        v = self.heads(x_BTD, "v")
        new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        if inputs.cache is None:
            out, weights = self.attend(q, k, v, inputs.mask, output_attentions)
            return self.output(out), new, weights
        T, cache, masks = x_BTD.shape[1], inputs.cache, inputs.decode_masks
        if masks is not None:
            out = self.attend_decode(
                q,
                keys=cache.keys,
                values=cache.values,
                layer=layer,
                allowed_B1S=masks.slots_B1S,
                used=inputs.start,
                new=new,
            )
            return self.output(out), new, None
        past_k, past_v = (cached.astype(self.execution.dtype) for cached in cache.read(layer))
        if T <= MAX_STEP and self.execution.attention != "reference" and not output_attentions:
            allowed = inputs.mask.rows(0, T)
            out = attend_step(q, past_k, past_v, k, v, allowed, inputs.start)
            return self.output(out), new, None
        k, v = (
            _written(old, fresh, inputs.start).swapaxes(1, 2)
            for old, fresh in zip((past_k, past_v), new, strict=True)
        )
        out, weights = self.attend(q, k, v, inputs.mask, output_attentions)
        return self.output(out), new, weights


def _written(past_BKSH: Array, new_BKTH: Array, start: Array) -> Array:
    """A layer's cached keys or values with those of new tokens from slot ``start`` on."""

    def write(past_KSH: Array, new_KTH: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice(past_KSH, new_KTH, (0, start, 0))

    return jax.vmap(write, in_axes=(0, 0, 0 if start.ndim else None))(past_BKSH, new_BKTH, start)


class CrossAttention(TextAttention):
    @nn.compact
    def __call__(
        self, x_BTD: Array, inputs: DecoderInputs, layer: Array, output_attentions: bool
    ) -> tuple[Array, KeysAndValues | None, Array | None]:
        norm = (self.config.rms_norm_eps, self.execution)
        q = RMSNorm(*norm, name="q_norm")(self.heads(x_BTD, "q"))
        cache, masks, new = inputs.cache, inputs.decode_masks, None
        if inputs.cross_attention_states is not None:
            k = RMSNorm(*norm, name="k_norm")(self.heads(inputs.cross_attention_states, "k"))
            v = self.heads(inputs.cross_attention_states, "v")
            new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        else:
            assert cache is not None
            if masks is not None:
                out = self.attend_decode(
                    q,
                    keys=cache.cross_keys,
                    values=cache.cross_values,
                    layer=layer,
                    allowed_B1S=masks.image_tokens_B1V,
                    used=masks.image_tokens_used_B,
                    new=None,
                )
                return self.output(out), None, None
            k, v = (
                cached.astype(self.execution.dtype).swapaxes(1, 2)
                for cached in cache.read_images(layer)
            )
        out, weights = self.attend(q, k, v, inputs.cross_mask, output_attentions)
        return self.output(out), new, weights


class SelfAttentionLayer(nn.Module):
    config: MllamaTextConfig
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        inputs: DecoderInputs,
        layer: Array,
        output_attentions: bool,
    ) -> tuple[Array, KeysAndValues | None, Array | None]:
        config, execution = self.config, self.execution
        branch = RMSNorm(config.rms_norm_eps, execution, name="input_layernorm")(x_BTD)
        branch, new, weights = SelfAttention(config, execution, name="self_attn")(
            branch, inputs, layer, output_attentions
        )
        x_BTD = x_BTD + branch
        branch = RMSNorm(config.rms_norm_eps, execution, name="post_attention_layernorm")(x_BTD)
        x_BTD = x_BTD + TextMLP(config, execution, name="mlp")(branch)
        return constrain(x_BTD, execution.mesh, "batch", "length", None), new, weights


class CrossAttentionLayer(nn.Module):
    config: MllamaTextConfig
    execution: Execution
    hf_masked_rows: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        inputs: DecoderInputs,
        layer: Array,
        output_attentions: bool,
    ) -> tuple[Array, KeysAndValues | None, Array | None]:
        config, execution = self.config, self.execution
        zeros = logical(jax.nn.initializers.zeros, None)
        attn_gate = self.param("cross_attn_attn_gate", zeros, (1,), execution.param_dtype)
        mlp_gate = self.param("cross_attn_mlp_gate", zeros, (1,), execution.param_dtype)

        branch = RMSNorm(config.rms_norm_eps, execution, name="input_layernorm")(x_BTD)
        branch, new, weights = CrossAttention(config, execution, name="cross_attn")(
            branch, inputs, layer, output_attentions
        )
        if not self.hf_masked_rows:
            branch = _where_image_seen(branch, inputs)
        x_BTD = x_BTD + gated(branch, attn_gate)
        branch = RMSNorm(config.rms_norm_eps, execution, name="post_attention_layernorm")(x_BTD)
        branch = TextMLP(config, execution, name="mlp")(branch)
        x_BTD = x_BTD + gated(_where_image_seen(branch, inputs), mlp_gate)
        return constrain(x_BTD, execution.mesh, "batch", "length", None), new, weights


def _where_image_seen(branch_BTD: Array, inputs: DecoderInputs) -> Array:
    if inputs.sees_image_BT is None:
        return branch_BTD
    return jnp.where(inputs.sees_image_BT[..., None], branch_BTD, 0)


@flax.struct.dataclass
class UnitOutputs:
    """What the layers of a unit leave behind beside their result, where asked for.

    Attributes:
      keys, values: of the new tokens, (self layers, B, K, T, H).
      cross_keys, cross_values: of new images, (cross layers, B, K, V, H).
      layer_inputs: for each layer, (B, T, D).
      attentions: the weights of each layer that attends to anything.
    """

    keys: Array | None
    values: Array | None
    cross_keys: Array | None
    cross_values: Array | None
    layer_inputs: tuple[Array, ...]
    attentions: tuple[Array, ...]


class DecoderUnit(nn.Module):
    """The repeating unit of self- and cross-attention layers, as a step of a scan."""

    config: MllamaTextConfig
    execution: Execution
    hf_masked_rows: bool
    with_images: bool
    output_cache: bool
    output_hidden_states: bool
    output_attentions: bool

    @nn.compact
    def __call__(
        self, x_BTD: Array, unit: Array, inputs: DecoderInputs
    ) -> tuple[Array, UnitOutputs]:
        config = self.config
        # 4: output_attentions, counted from the module itself.
        self_layer, cross_layer = (
            self.execution.rematerialised(kind, static_argnums=(4,))
            for kind in (SelfAttentionLayer, CrossAttentionLayer)
        )
        is_cross = [config.is_cross_attention_layer(i) for i in range(config.unit_length)]
        layer_inputs: list[Array] = []
        attentions: list[Array] = []
        computed: dict[bool, list[KeysAndValues]] = {False: [], True: []}
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
            x_BTD, new, weights = layer(x_BTD, inputs, index, self.output_attentions)
            if self.output_cache and new is not None:
                computed[cross].append(new)
            if weights is not None:
                attentions.append(weights)

        def stacked(cross: bool, which: int) -> Array | None:
            return jnp.stack([pair[which] for pair in computed[cross]]) if computed[cross] else None

        return x_BTD, UnitOutputs(
            keys=stacked(False, 0),
            values=stacked(False, 1),
            cross_keys=stacked(True, 0),
            cross_values=stacked(True, 1),
            layer_inputs=tuple(layer_inputs),
            attentions=tuple(attentions),
        )


def decode_masks(inputs: DecoderInputs) -> DecodeMasks:
    """The masks of a call with a cache and one new token."""
    assert inputs.cache is not None
    images = used = None
    if inputs.cache.cross_keys is not None:
        num_samples, V = inputs.mask.valid_BS.shape[0], inputs.cache.num_image_tokens
        mask = inputs.cross_mask
        allowed = jnp.ones((num_samples, 1, V), bool) if mask is None else mask.rows(0, 1)
        rounded = inputs.cache.cross_keys.shape[3]
        images = jnp.pad(allowed.astype(jnp.int32), ((0, 0), (0, 0), (0, rounded - V)))
        used = jnp.max(jnp.where(images[:, 0] != 0, jnp.arange(rounded) + 1, 0), axis=1)
    return DecodeMasks(inputs.mask.rows(0, 1).astype(jnp.int32), images, used)


def grown_cache(
    cache: MllamaCache, start: Array, outputs: UnitOutputs, mesh: Mesh | None
) -> MllamaCache:
    """The cache after a call whose new tokens stand in the slots from ``start`` on."""

    def merged(stacked: Array) -> Array:
        """(units, layers of a unit, …) as (layers, …), in decoder order."""
        return stacked.reshape(-1, *stacked.shape[2:])

    if outputs.keys is not None and outputs.values is not None:
        cache = cache.append(start, merged(outputs.keys), merged(outputs.values), mesh)
    if outputs.cross_keys is not None and outputs.cross_values is not None:
        cache = cache.with_images(merged(outputs.cross_keys), merged(outputs.cross_values))
    return cache


def unstack_layers(per_block: tuple[Array, ...], num_units: int) -> tuple[Array, ...]:
    """Puts scan outputs, one array (U, ...) for each block of the unit, into layer order."""
    return tuple(stacked[unit] for unit in range(num_units) for stacked in per_block)
