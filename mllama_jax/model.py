"""The whole model: vision encoder, projector and language model."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from mllama_jax.cache import LegacyCache, MllamaCache
from mllama_jax.configs import MllamaConfig
from mllama_jax.layers import projection
from mllama_jax.outputs import CausalLMOutputWithPast
from mllama_jax.shapes import Array, Float, Int
from mllama_jax.sharding import constrain, num_parts
from mllama_jax.text import GenerativeModule, MllamaForCausalLM
from mllama_jax.tiles import with_all_tiles
from mllama_jax.vision import MllamaVisionModel, dummy_images


class MllamaForConditionalGeneration(GenerativeModule):
    """Llama 3.2 Vision; see `__call__` and `PretrainedModule`.

    ::

        model, params = MllamaForConditionalGeneration.from_pretrained(folder)
        output = model.apply({"params": params}, **inputs)
    """

    component = "model"

    @property
    def full_config(self) -> MllamaConfig:
        if not isinstance(self.config, MllamaConfig):
            raise TypeError(f"config is {type(self.config).__name__}, expected MllamaConfig")
        return self.config

    def setup(self) -> None:
        config = self.full_config
        self.vision_model = MllamaVisionModel(config.vision_config, **self.settings)
        self.language_model = MllamaForCausalLM(config.text_config, **self.settings)
        self.multi_modal_projector = projection(
            config.text_config.hidden_size,
            ("vision_output", "embed"),
            name=None,
            use_bias=True,
            std=config.text_config.initializer_range,
            execution=self.execution,
        )

    def encode_images(
        self,
        pixel_values: Float[Array, "B M L C height width"],
        aspect_ratio_ids: Int[Array, "B M"],
        aspect_ratio_mask: Int[Array, "B M L"] | None = None,
        num_tiles: int | None = None,
    ) -> Float[Array, "B V D"]:
        """Image features as the decoder attends to them, (B, M*L*P, D): ``cross_attention_states``.

        The arguments are `MllamaVisionModel.__call__`'s. Whatever ``num_tiles`` says, there are
        features of all tiles.
        """
        B, M = pixel_values.shape[:2]
        inputs: list[Array] = [pixel_values, aspect_ratio_ids]
        if aspect_ratio_mask is not None:
            inputs.append(aspect_ratio_mask)
        shards = num_parts("batch", B, self.mesh)
        a_device = B * M // shards
        if self.images_at_once is None or a_device <= self.images_at_once:
            features = self._encode(inputs, num_tiles)
        else:
            features = self._encode_in_turns(inputs, shards, a_device, num_tiles)
        return rearrange(features, "(B M) L P D -> B (M L P) D", B=B)

    def _encode(self, inputs: Sequence[Array], num_tiles: int | None) -> Array:
        """Projected features (B * M, L, P, D)."""
        encode: Any = self.vision_model
        features = encode(*inputs, num_tiles=num_tiles)
        projected = self.multi_modal_projector(features.last_hidden_state)
        projected = rearrange(projected, "B M L P D -> (B M) L P D")
        return with_all_tiles(projected, self.full_config.vision_config.max_num_tiles)

    def _encode_in_turns(
        self, inputs: Sequence[Array], shards: int, a_device: int, num_tiles: int | None
    ) -> Array:
        """``images_at_once`` pictures of every device's own at a time."""
        assert self.images_at_once is not None
        turns = -(-a_device // self.images_at_once)
        room = turns * self.images_at_once - a_device

        def in_turns(x: Array) -> Array:
            """(B, M, …) to (turns, pictures of a turn on all devices, 1, …), without exchange."""
            x = x.reshape(shards, a_device, 1, *x.shape[2:])
            x = jnp.pad(x, [(0, 0), (0, room)] + [(0, 0)] * (x.ndim - 2))
            x = rearrange(x, "s (t i) ... -> t (s i) ...", t=turns)
            return constrain(x, self.mesh, None, "batch", *[None] * (x.ndim - 2))

        def encode(model: MllamaForConditionalGeneration, _: None, turn: Any) -> tuple[None, Array]:
            return None, model._encode(turn, num_tiles)

        encode = encode if self.remat == "none" else nn.remat(encode, prevent_cse=False)
        scanned = nn.scan(
            encode,  # type: ignore[arg-type]
            variable_broadcast="params",
            split_rngs={"params": False},
            check_constancy_invariants=False,
        )
        _, features = scanned(self, None, [in_turns(jnp.asarray(x)) for x in inputs])
        features = rearrange(features, "t (s i) ... -> s (t i) ...", s=shards)[:, :a_device]
        features = features.reshape(-1, *features.shape[2:])
        return constrain(features, self.mesh, "batch", None, None, None)

    def __call__(
        self,
        input_ids: Int[Array, "B T"] | None = None,
        pixel_values: Float[Array, "B M L C height width"] | None = None,
        aspect_ratio_mask: Int[Array, "B M L"] | None = None,
        aspect_ratio_ids: Int[Array, "B M"] | None = None,
        attention_mask: Int[Array, "B S"] | None = None,
        cross_attention_mask: Int[Array, "B T M L"] | None = None,
        cross_attention_states: Float[Array, "B V D"] | None = None,
        position_ids: Int[Array, "B T"] | None = None,
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
        """Reads pictures and text, predicts the next token of each text token.

        Pictures are given as ``pixel_values`` with ``aspect_ratio_ids``, or as features
        (``cross_attention_states``, from `encode_images`), or through a cache that holds them.

        Args:
          input_ids, attention_mask, cross_attention_mask, cross_attention_states, position_ids,
            past_key_values, inputs_embeds, labels, use_cache, output_attentions,
            output_hidden_states, return_dict, cache_position, num_logits_to_keep, segment_ids: see
            `MllamaForCausalLM.__call__` and `MllamaTextModel.__call__`.
          pixel_values, aspect_ratio_ids, aspect_ratio_mask: see `MllamaVisionModel.__call__`.

        Returns:
          `CausalLMOutputWithPast`, or with ``return_dict=False`` its fields that are not None.

        Raises:
          ValueError: arguments exclude each other, one is missing, or shapes disagree.
        """
        if pixel_values is not None:
            given = {
                "input_ids": input_ids,
                "inputs_embeds": inputs_embeds,
                "cross_attention_states": cross_attention_states,
                "cross_attention_mask": cross_attention_mask,
            }
            cross_attention_states = self._states_of_pixels(
                given, pixel_values, aspect_ratio_ids, aspect_ratio_mask
            )
        return self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cross_attention_states=cross_attention_states,
            cross_attention_mask=cross_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            cache_position=cache_position,
            num_logits_to_keep=num_logits_to_keep,
            segment_ids=segment_ids,
        )

    def loss(
        self,
        labels: Int[Array, "B T"],
        pixel_values: Float[Array, "B M L C height width"] | None = None,
        aspect_ratio_ids: Int[Array, "B M"] | None = None,
        aspect_ratio_mask: Int[Array, "B M L"] | None = None,
        **inputs: Any,
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """The sum of the labels' losses and their number, as `MllamaForCausalLM.loss`.

        Args:
          pixel_values, aspect_ratio_ids, aspect_ratio_mask: as for `__call__`.
          **inputs: its other arguments, as `MllamaForCausalLM.loss` takes them.
        """
        if pixel_values is not None:
            inputs["cross_attention_states"] = self._states_of_pixels(
                inputs, pixel_values, aspect_ratio_ids, aspect_ratio_mask
            )
        return self.language_model.loss(labels, **inputs)

    def _states_of_pixels(
        self,
        inputs: Mapping[str, Array | None],
        pixel_values: Array,
        aspect_ratio_ids: Array | None,
        aspect_ratio_mask: Array | None,
    ) -> Array:
        """Image features of a call that gives pixels, once they are found to fit its inputs."""
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        text = embeddings if ids is None else ids
        if text is None:
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs.get("cross_attention_states") is not None:
            raise ValueError("pixel_values and cross_attention_states exclude each other")
        if aspect_ratio_ids is None:
            raise ValueError("pixel_values needs aspect_ratio_ids")
        if pixel_values.shape[0] != len(text):
            raise ValueError(
                f"pixel_values has {pixel_values.shape[0]} samples, the text {len(text)}"
            )
        states = self.encode_images(pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        images = pixel_values.shape[1:3]
        cross_attention_mask = inputs.get("cross_attention_mask")
        if cross_attention_mask is not None and (
            cross_attention_mask.ndim != 4 or cross_attention_mask.shape[2:] != images
        ):
            raise ValueError(
                f"cross_attention_mask has shape {cross_attention_mask.shape}, expected "
                f"(batch, tokens, {images[0]}, {images[1]}) to match pixel_values "
                f"{pixel_values.shape}"
            )
        return states

    @nn.nowrap
    def dummy_inputs(self) -> dict[str, Array]:
        images = dummy_images(self.full_config.vision_config, self.dtype)
        return {"input_ids": jnp.zeros((1, 1), jnp.int32), **images}
