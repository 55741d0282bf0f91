"""Keys and values of past tokens and of images: a pytree that goes in and comes out."""

import dataclasses
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from mllama_jax.configs import MllamaTextConfig
from mllama_jax.shapes import Array, Float, Int

LegacyCache = tuple[tuple[Array, Array] | None, ...]
"""Hugging Face's older format: a (keys, values) pair for each decoder layer."""


@flax.struct.dataclass
class MllamaCache:
    """The decoder's cache; its sizes are fixed when it is made (`create`).

    Layers of one kind are stacked on the first axis, in decoder order; only the key/value heads
    are stored. Image keys and values are written once, when the images are given, and have a
    length of their own.

    Attributes:
      keys, values: of the self-attention layers, (self layers, B, S, K, H), rotated already.
      cross_keys, cross_values: of the cross-attention layers, (cross layers, B, V, K, H);
        None while no image has been seen.
      length: how many slots are written, int32 scalar.
    """

    keys: Float[Array, "layers B S K H"]
    values: Float[Array, "layers B S K H"]
    cross_keys: Float[Array, "cross_layers B V K H"] | None
    cross_values: Float[Array, "cross_layers B V K H"] | None
    length: Int[Array, ""]

    @classmethod
    def create(
        cls,
        config: MllamaTextConfig,
        batch_size: int,
        max_length: int,
        num_image_tokens: int = 0,
        dtype: jnp.dtype = jnp.float32,
    ) -> Self:
        """An empty cache of ``max_length`` slots and room for ``num_image_tokens`` a sample."""
        num_cross = len(config.cross_attention_layers)
        num_self = config.num_hidden_layers - num_cross
        heads = (config.num_key_value_heads, config.head_dim)
        text = (num_self, batch_size, max_length, *heads)
        image = (num_cross, batch_size, num_image_tokens, *heads)
        return cls(
            keys=jnp.zeros(text, dtype),
            values=jnp.zeros(text, dtype),
            cross_keys=jnp.zeros(image, dtype) if num_image_tokens else None,
            cross_values=jnp.zeros(image, dtype) if num_image_tokens else None,
            length=jnp.zeros((), jnp.int32),
        )

    @classmethod
    def from_legacy_cache(cls, config: MllamaTextConfig, layers: LegacyCache, room: int) -> Self:
        """The cache that holds what `to_legacy_cache` returned, with ``room`` more slots."""
        if len(layers) != config.num_hidden_layers:
            raise ValueError(
                f"past_key_values has {len(layers)} layers, the model {config.num_hidden_layers}"
            )
        text = [pair for i, pair in enumerate(layers) if not config.is_cross_attention_layer(i)]
        image = [layers[i] for i in sorted(config.cross_attention_layers)]

        def stack(pairs: list[Any], which: int, slots: int) -> Array:
            stacked = jnp.stack([pair[which] for pair in pairs]).swapaxes(2, 3)
            return jnp.pad(stacked, ((0, 0), (0, 0), (0, slots), (0, 0), (0, 0)))

        keys, values = (stack(text, which, room) for which in (0, 1))
        cross_keys = cross_values = None
        if image and image[0] is not None:
            cross_keys, cross_values = (stack(image, which, 0) for which in (0, 1))
        length = jnp.asarray(keys.shape[2] - room, jnp.int32)
        return cls(keys, values, cross_keys, cross_values, length)

    def to_legacy_cache(self, config: MllamaTextConfig) -> LegacyCache:
        """One (keys, values) pair a decoder layer, (B, K, slots, H) each; all slots.

        None stands for the cross-attention layers while no image has been seen.
        """
        layers: list[tuple[Array, Array] | None] = []
        num_cross = 0
        for i in range(config.num_hidden_layers):
            if not config.is_cross_attention_layer(i):
                index = i - num_cross
                layers.append((self.keys[index].swapaxes(1, 2), self.values[index].swapaxes(1, 2)))
                continue
            if self.cross_keys is None or self.cross_values is None:
                layers.append(None)
            else:
                pair = (self.cross_keys[num_cross], self.cross_values[num_cross])
                layers.append((pair[0].swapaxes(1, 2), pair[1].swapaxes(1, 2)))
            num_cross += 1
        return tuple(layers)

    @property
    def max_length(self) -> int:
        """Slots for text tokens."""
        return self.keys.shape[2]

    @property
    def num_image_tokens(self) -> int:
        """Image tokens a sample, 0 while no image has been seen."""
        return 0 if self.cross_keys is None else self.cross_keys.shape[2]

    def append(
        self,
        layer: Int[Array, ""],
        start: Int[Array, ""],
        keys_BTKH: Float[Array, "B T K H"],
        values_BTKH: Float[Array, "B T K H"],
    ) -> Self:
        """Writes a self-attention layer's new keys and values to the slots from ``start`` on."""
        zero = jnp.zeros((), jnp.int32)
        place = (layer, zero, start, zero, zero)
        return dataclasses.replace(
            self,
            keys=_write(self.keys, keys_BTKH, place),
            values=_write(self.values, values_BTKH, place),
        )

    def read(self, layer: Int[Array, ""]) -> tuple[Array, Array]:
        """A self-attention layer's keys and values, (B, S, K, H) each."""
        return _layer(self.keys, layer), _layer(self.values, layer)

    def write_images(
        self,
        layer: Int[Array, ""],
        keys_BVKH: Float[Array, "B V K H"],
        values_BVKH: Float[Array, "B V K H"],
    ) -> Self:
        """Sets a cross-attention layer's keys and values."""
        zero = jnp.zeros((), jnp.int32)
        place = (layer, zero, zero, zero, zero)
        cross_keys, cross_values = self._images()
        return dataclasses.replace(
            self,
            cross_keys=_write(cross_keys, keys_BVKH, place),
            cross_values=_write(cross_values, values_BVKH, place),
        )

    def read_images(self, layer: Int[Array, ""]) -> tuple[Array, Array]:
        """A cross-attention layer's keys and values, (B, V, K, H) each."""
        cross_keys, cross_values = self._images()
        return _layer(cross_keys, layer), _layer(cross_values, layer)

    def _images(self) -> tuple[Array, Array]:
        if self.cross_keys is None or self.cross_values is None:
            raise ValueError("the cache has no room for images (num_image_tokens is 0)")
        return self.cross_keys, self.cross_values


def _write(stack: Array, update: Array, place: tuple[Array, ...]) -> Array:
    return jax.lax.dynamic_update_slice(stack, update[None].astype(stack.dtype), place)


def _layer(stack: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
