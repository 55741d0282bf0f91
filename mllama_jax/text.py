"""The language model: the decoder with its embedding, and with the head on top."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from mllama_jax.cache import LegacyCache, MllamaCache
from mllama_jax.configs import MllamaConfig, MllamaTextConfig
from mllama_jax.decoder import (
    DecoderInputs,
    DecoderUnit,
    UnitOutputs,
    decode_masks,
    grown_cache,
    unstack_layers,
)
from mllama_jax.decoder_inputs import (
    batch_and_length,
    check_cache,
    check_room_for_images,
    check_segments,
    check_shape,
    features_of_samples,
    segment_positions,
    tile_mask,
    valid_slots,
)
from mllama_jax.generation.config import GenerationConfig
from mllama_jax.layers import Embedding, RMSNorm, projection, scan_layers
from mllama_jax.loss import IGNORED_LABEL, cross_entropy, loss_in_chunks, shift_labels
from mllama_jax.masks import CausalMask
from mllama_jax.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.rope import inverse_frequencies, rotary_table
from mllama_jax.shapes import Array, Float, Int
from mllama_jax.sharding import constrain, num_parts

if TYPE_CHECKING:
    from mllama_jax.generation.generate import GenerateOutput


LOGITS_AT_ONCE = 2**26
"""Of a device, in the loss: 512 tokens of a whole vocabulary; far fewer make products slow."""
MOST_TOKENS = 2**14
"""Whose states all devices that share the head have at once, in the loss."""


@dataclasses.dataclass(frozen=True)
class _LossOfTokens:
    """The sum of the losses of tokens, from the head's parameters and the tokens' states."""

    head: nn.Module
    z_loss: float
    mesh: Mesh | None

    def __call__(self, params: Params, x_SLD: Array, labels_SL: Array) -> Array:
        head = partial(self.head.apply, {"params": params})
        # Otherwise each chunk is cut out of the states of all devices' tokens, exchanged for it.
        x_SLD = constrain(x_SLD, self.mesh, "batch", "length", None)
        return cross_entropy(_logits(head, x_SLD, self.mesh), labels_SL, self.z_loss)[0]


def _logits(head: Callable[..., Any], x_BTD: Array, mesh: Mesh | None) -> Array:
    """Each device's own part of the vocabulary, for the samples of all that share the head."""
    x_BTD = constrain(x_BTD, mesh, "gathered_batch", "length", None)
    return constrain(head(x_BTD), mesh, "gathered_batch", "length", "vocab")


class DecoderModule(PretrainedModule):
    """What the models that hold a decoder share."""

    @property
    def text_config(self) -> MllamaTextConfig:
        config = self.config
        if isinstance(config, MllamaConfig):
            return config.text_config
        if not isinstance(config, MllamaTextConfig):
            raise TypeError(f"config is {type(config).__name__}, expected MllamaTextConfig")
        return config

    @nn.nowrap
    def init_cache(
        self, batch_size: int, max_length: int, num_image_tokens: int = 0
    ) -> MllamaCache:
        """An empty cache in the computation's dtype, to be given as ``past_key_values``.

        Args:
          batch_size: samples.
          max_length: slots for prompt and new tokens together.
          num_image_tokens: image tokens a sample (images × tiles × patches), 0 for text only.
        """
        return MllamaCache.create(
            self.text_config, batch_size, max_length, num_image_tokens, jnp.dtype(self.dtype)
        )

    @nn.nowrap
    def dummy_inputs(self) -> dict[str, Array]:
        return {
            "input_ids": jnp.zeros((1, 1), jnp.int32),
            "cross_attention_states": jnp.zeros((1, 1, self.text_config.hidden_size), self.dtype),
        }


class GenerativeModule(DecoderModule):
    """What the models with a head share.

    Attributes:
      generation_config: the defaults of `generate`; `from_pretrained` takes them from the
        checkpoint's ``generation_config.json``. None stands for those of the configuration.
    """

    generation_config: GenerationConfig | None = None

    @nn.nowrap
    def generate(
        self, params: Params, input_ids: Int[Array, "B T"], **inputs: Any
    ) -> "GenerateOutput":
        """Continues prompts, with or without pictures; see `mllama_jax.generation`."""
        from mllama_jax.generation.generate import generate

        return generate(self, params, input_ids, **inputs)

    @nn.nowrap
    def save_pretrained(
        self, params: Params, folder: epath.PathLike, *, max_shard_size: str = "5GB"
    ) -> None:
        super().save_pretrained(params, folder, max_shard_size=max_shard_size)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)


class MllamaTextModel(DecoderModule):
    """The decoder without its head; see `__call__` and `PretrainedModule`."""

    component = "text_model"

    def setup(self) -> None:
        config = self.text_config
        self.embed_tokens = Embedding(
            config.num_embeddings, config.hidden_size, config.initializer_range, self.execution
        )
        self.norm = RMSNorm(config.rms_norm_eps, self.execution)

    @nn.compact
    def _layers(
        self, x_BTD: Array, inputs: DecoderInputs, **flags: bool
    ) -> tuple[Array, UnitOutputs]:
        config = self.text_config
        execution = dataclasses.replace(self.execution, quantise=self.quantise)
        scanned = scan_layers(DecoderUnit, config.num_units)
        return scanned(config, execution, self.hf_masked_rows, name="layers", **flags)(
            x_BTD, jnp.arange(config.num_units), inputs
        )

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        cross_attention_states: Float[Array, "B V D"] | None = None,
        cross_attention_mask: Int[Array, "B T M L"] | None = None,
        full_text_row_masked_out_mask: Float[Array, "B 1 T 1"] | None = None,
        past_key_values: MllamaCache | LegacyCache | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Int[Array, "T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Runs the decoder over ``T`` new tokens.

        Without image features, given or cached, the cross-attention layers are skipped and the
        model is a plain Llama.

        Args:
          input_ids: (B, T) token ids; or give ``inputs_embeds`` (B, T, D).
          attention_mask: 1 for tokens, 0 for padding. (B, T); with ``past_key_values`` it covers
            the slots from 0 on, (B, n) with n up to the cache's length, and slots beyond it count
            as 1 (those not yet written are hidden anyway).
          position_ids: (B, T) or (1, T) rotary positions; if None ``cache_position``, or places
            within the segments.
          cross_attention_states: projected image features, (B, M*L*P, D); Hugging Face's
            (B*M*L, P, D) is accepted too.
          cross_attention_mask: (B, T, M, L), 1 where a token may attend to a tile; None for
            all. With ``cache_position`` it may cover the whole text, of which these rows are taken.
          full_text_row_masked_out_mask: (B, 1, T, 1), 0 for tokens that may attend to no tile;
            taken from ``cross_attention_mask`` if None.
          past_key_values: a cache (`DecoderModule.init_cache`) with room for T more tokens; or
            Hugging Face's older tuple of (keys, values) pairs, which comes back T slots longer.
          use_cache: return the cache; the configuration's ``use_cache`` if None. Without
            ``past_key_values`` the returned one has exactly T slots: sizes are fixed in JAX.
          output_attentions, output_hidden_states: also return these; weights are computed by the
            "reference" attention, whatever the module's kind.
          return_dict: False returns a tuple.
          cache_position: (T,) consecutive slots of the new tokens; the next free ones if None.
          segment_ids: (B, T), where texts are packed: those of a row stand one behind the other
            and are numbered from 1; 0 is padding. Tokens attend to their own text only and
            positions start anew with each; the row's images are those of all its texts, and
            ``cross_attention_mask`` must say whose they are.

        Raises:
          ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``; shapes disagree; the
            cache is full (seen only outside `jax.jit`); ``segment_ids`` with ``attention_mask``,
            with a cache, or with images but no ``cross_attention_mask``.
        """
        config = self.text_config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        B, T = batch_and_length(input_ids, inputs_embeds, config)
        check_shape("position_ids", position_ids, (B, T), (1, T))
        check_shape("cache_position", cache_position, (T,))
        check_shape("full_text_row_masked_out_mask", full_text_row_masked_out_mask, (B, 1, T, 1))
        x_BTD = inputs_embeds if input_ids is None else self.embed_tokens(input_ids)
        assert x_BTD is not None
        x_BTD = constrain(x_BTD.astype(self.dtype), self.mesh, "batch", "length", None)
        if segment_ids is not None:
            check_shape("segment_ids", segment_ids, (B, T))
            check_segments(
                attention_mask=attention_mask is not None,
                past_key_values=past_key_values is not None,
                cache_position=cache_position is not None,
                use_cache=bool(use_cache),
                hf_masked_rows=self.hf_masked_rows,
            )
            if cross_attention_states is not None and cross_attention_mask is None:
                raise ValueError("segment_ids with images needs cross_attention_mask")
            use_cache = False
        use_cache = config.use_cache if use_cache is None else use_cache

        start = jnp.zeros((), jnp.int32)
        cache: MllamaCache | None
        if isinstance(past_key_values, tuple):
            cache = MllamaCache.from_legacy_cache(config, past_key_values, room=T)
        else:
            cache = past_key_values
        if cache is not None:
            start = cache.length if cache_position is None else cache_position[0]
            check_cache(cache, B, T, start)
        else:
            check_shape("attention_mask", attention_mask, (B, T))
        # The slots of the new tokens, (T,), or (B, T) where samples differ.
        slots = start[..., None] + jnp.arange(T)
        if position_ids is None and segment_ids is not None:
            position_ids = segment_positions(segment_ids)
        elif position_ids is None:
            position_ids = jnp.atleast_2d(slots if cache_position is None else cache_position)
        cos, sin = rotary_table(position_ids, inverse_frequencies(config))

        if cross_attention_states is not None:
            cross_attention_states = features_of_samples(cross_attention_states, B, config)
            num_image_tokens = cross_attention_states.shape[1]
        else:
            num_image_tokens = 0 if cache is None else cache.num_image_tokens
        if cache is not None and cross_attention_states is not None:
            check_room_for_images(cache, num_image_tokens)

        cross_mask, sees_image_BT = tile_mask(
            cross_attention_mask, B, T, num_image_tokens, cache_position, self.hf_masked_rows
        )
        if full_text_row_masked_out_mask is not None:
            sees_image_BT = full_text_row_masked_out_mask[:, 0, :, 0] != 0
        num_slots = T if cache is None else cache.max_length
        inputs = DecoderInputs(
            cos=cos,
            sin=sin,
            mask=CausalMask(
                slots,
                valid_slots(attention_mask, B, num_slots) if segment_ids is None else segment_ids,
                segment_ids,
            ),
            start=start,
            cache=cache,
            cross_attention_states=cross_attention_states,
            cross_mask=cross_mask,
            sees_image_BT=sees_image_BT,
        )
        is_decoding = T == 1 and cache is not None and cross_attention_states is None
        if is_decoding and not output_attentions and self.attention != "reference":
            inputs = dataclasses.replace(inputs, decode_masks=decode_masks(inputs))
        x_BTD, outputs = self._layers(
            x_BTD,
            inputs,
            with_images=num_image_tokens > 0,
            output_cache=use_cache,
            output_hidden_states=bool(output_hidden_states),
            output_attentions=bool(output_attentions),
        )
        x_BTD = self.norm(x_BTD)
        past: MllamaCache | LegacyCache | None = None
        if use_cache:
            past = self.init_cache(B, T) if cache is None else cache
            past = grown_cache(past, start, outputs, self.mesh)
            if isinstance(past_key_values, tuple):
                past = past.to_legacy_cache(config)
        hidden_states = attentions = None
        if output_hidden_states:
            hidden_states = (*unstack_layers(outputs.layer_inputs, config.num_units), x_BTD)
        if output_attentions:
            attentions = unstack_layers(outputs.attentions, config.num_units)
        output = BaseModelOutputWithPast(x_BTD, past, hidden_states, attentions)
        return output.to_tuple() if return_dict is False else output


class MllamaForCausalLM(GenerativeModule):
    """The text-only language model: decoder and head, never the vision encoder's parameters."""

    component = "language_model"

    def setup(self) -> None:
        config = self.text_config
        self.model = MllamaTextModel(config, **self.settings)
        self.lm_head = projection(
            config.vocab_size,
            ("head_input", "vocab"),
            name=None,
            std=config.initializer_range,
            execution=self.execution,
            # Logits are float32 whatever the weights are, without a float32 copy of the weights.
            result_dtype=jnp.float32,
        )

    def loss(
        self,
        labels: Int[Array, "B T"],
        *,
        tokens_at_once: int | None = None,
        z_loss: float = 0.0,
        **inputs: Any,
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """The sum over labels of ``-log p(label)``, float32, and how many labels count.

        As the loss of `__call__`, times the count, but the logits never exist all at once, neither
        here nor in the backward pass, and none are computed of tokens without a label.

        Args:
          labels: (B, T) token ids, as for `__call__`.
          tokens_at_once: the logits of about so many tokens exist at a time, split over the devices
            that share the head; None makes them about 250 MB a device.
          z_loss: the weight of the softmax's denominator in the sum, as `cross_entropy` adds it.
          **inputs: other arguments of `MllamaTextModel.__call__`.
        """
        outputs: Any = self.model(**inputs, use_cache=False)
        labels = shift_labels(labels, inputs.get("segment_ids"))
        x_BTD = outputs.last_hidden_state
        x_SND, labels_SN = (self._in_shards(x) for x in (x_BTD, labels))
        shards = len(labels_SN) // num_parts("gathered_batch", len(labels_SN), self.mesh)
        if tokens_at_once is None:
            parts = num_parts("vocab", self.text_config.vocab_size, self.mesh)
            tokens_at_once = min(LOGITS_AT_ONCE * parts // self.text_config.vocab_size, MOST_TOKENS)
        chunk = min(labels_SN.shape[1], max(tokens_at_once // shards, 1))
        head, variables = self.lm_head.unbind()
        loss_of = _LossOfTokens(head.clone(name="lm_head"), z_loss, self.mesh)
        total = loss_in_chunks(loss_of, variables["params"], x_SND, labels_SN, chunk)
        return total, (labels_SN != IGNORED_LABEL).sum()

    def _in_shards(self, x: Array) -> Array:
        """(B, T, …) to (S, B / S · T, …), S being the devices that samples are split over."""
        shards = num_parts("batch", len(x), self.mesh)
        x = x.reshape(shards, -1, *x.shape[2:])
        return constrain(x, self.mesh, "batch", *[None] * (x.ndim - 1))

    def _logits(self, x_BTD: Array) -> Array:
        return _logits(self.lm_head, x_BTD, self.mesh)

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        attention_mask: Int[Array, "B S"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
        cross_attention_states: Float[Array, "B V D"] | None = None,
        cross_attention_mask: Int[Array, "B T M L"] | None = None,
        full_text_row_masked_out_mask: Float[Array, "B 1 T 1"] | None = None,
        past_key_values: MllamaCache | LegacyCache | None = None,
        inputs_embeds: Float[Array, "B T D"] | None = None,
        labels: Int[Array, "B T"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Int[Array, "T"] | None = None,
        num_logits_to_keep: int | Int[Array, "kept"] = 0,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Runs the decoder over ``T`` new tokens and predicts the next one of each.

        Args:
          labels: (B, T) token ids, -100 for tokens that don't count; label t is what token t-1 is
            to predict (they are shifted here). The loss is the mean over labels that count, NaN
            if there is none.
          num_logits_to_keep: compute logits of the last so many tokens only, 0 for all; or of the
            tokens of these indices, an array, which need not be known when this is compiled.

        The other arguments are `MllamaTextModel.__call__`'s.

        Returns:
          `CausalLMOutputWithPast`, or with ``return_dict=False`` its fields that are not None.

        Raises:
          ValueError: as `MllamaTextModel.__call__`; or ``labels`` don't match the logits.
        """
        outputs: Any = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cross_attention_states=cross_attention_states,
            cross_attention_mask=cross_attention_mask,
            full_text_row_masked_out_mask=full_text_row_masked_out_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
            segment_ids=segment_ids,
        )

        def kept(x: Array) -> Array:
            if isinstance(num_logits_to_keep, int):
                return x[:, -num_logits_to_keep:]
            return jnp.take(x, num_logits_to_keep, axis=1)

        logits = self._logits(kept(outputs.last_hidden_state))
        segment_ids = None if segment_ids is None else kept(segment_ids)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels has shape {labels.shape}, expected {logits.shape[:2]}: one for each "
                    f"logit (num_logits_to_keep={num_logits_to_keep})"
                )
            total, count = cross_entropy(logits, shift_labels(labels, segment_ids))
            loss = total / count
        output = CausalLMOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )
        return output.to_tuple() if return_dict is False else output
