"""Keys and values of past tokens and of images: a pytree that goes in and comes out."""

import dataclasses
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from mllama_jax.configs import MllamaTextConfig
from mllama_jax.shapes import Array, Float, Int
from mllama_jax.sharding import constrain, partition_spec

IMAGE_TOKENS_MULTIPLE = 16
"""Whole tiles of a TPU's memory; otherwise it lays the image tokens out another way outside of
compiled functions than inside, and copies them all at each call."""

LegacyCache = tuple[tuple[Array, Array] | None, ...]
"""Hugging Face's older format: a (keys, values) pair for each decoder layer."""


@flax.struct.dataclass
class MllamaCache:
    """The decoder's cache; its sizes are fixed when it is made (`create`).

    Layers of one kind are stacked on the first axis, in decoder order; only the key/value heads
    are stored, and a head's tokens lie one behind the other, as attention reads them: with any
    other order of axes a TPU copies the whole cache for each token. Image keys and values are
    written once, when the images are given, and have a length of their own.

    Attributes:
      keys, values: of the self-attention layers, (self layers, B, K, S, H), rotated already.
      cross_keys, cross_values: of the cross-attention layers, (cross layers, B, K, V, H), with V
        rounded up to a multiple of 16; None while no image has been seen.
      length: how many slots are written, int32: a scalar, or (B,) where samples differ.
      num_image_tokens: image tokens a sample, 0 while no image has been seen.
    """

    keys: Float[Array, "layers B K S H"]
    values: Float[Array, "layers B K S H"]
    cross_keys: Float[Array, "cross_layers B K V H"] | None
    cross_values: Float[Array, "cross_layers B K V H"] | None
    length: Int[Array, ""] | Int[Array, "B"]
    num_image_tokens: int = flax.struct.field(pytree_node=False, default=0)

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
        heads, head_dim = config.num_key_value_heads, config.head_dim
        text = (num_self, batch_size, heads, max_length, head_dim)
        rounded = num_image_tokens + -num_image_tokens % IMAGE_TOKENS_MULTIPLE
        image = (num_cross, batch_size, heads, rounded, head_dim)
        return cls(
            keys=jnp.zeros(text, dtype),
            values=jnp.zeros(text, dtype),
            cross_keys=jnp.zeros(image, dtype) if num_image_tokens else None,
            cross_values=jnp.zeros(image, dtype) if num_image_tokens else None,
            length=jnp.zeros((), jnp.int32),
            num_image_tokens=num_image_tokens,
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
            stacked = jnp.stack([pair[which] for pair in pairs])
            return jnp.pad(stacked, ((0, 0), (0, 0), (0, 0), (0, slots), (0, 0)))

        keys, values = (stack(text, which, room) for which in (0, 1))
        length = jnp.asarray(keys.shape[3] - room, jnp.int32)
        cache = cls(keys, values, None, None, length)
        if image and image[0] is not None:
            cache = cache.with_images(*(stack(image, which, 0) for which in (0, 1)))
        return cache

    def to_legacy_cache(self, config: MllamaTextConfig) -> LegacyCache:
        """One (keys, values) pair a decoder layer, (B, K, slots, H) each; all slots.

        None stands for the cross-attention layers while no image has been seen.
        """
        layers: list[tuple[Array, Array] | None] = []
        num_cross = 0
        for i in range(config.num_hidden_layers):
            if not config.is_cross_attention_layer(i):
                index = i - num_cross
                layers.append((self.keys[index], self.values[index]))
                continue
            if self.cross_keys is None or self.cross_values is None:
                layers.append(None)
            else:
                layers.append(self.read_images(jnp.int32(num_cross)))
            num_cross += 1
        return tuple(layers)

    @property
    def max_length(self) -> int:
        """Slots for text tokens."""
        return self.keys.shape[3]

    def append(
        self,
        start: Int[Array, ""] | Int[Array, "B"],
        keys: Float[Array, "layers B K T H"],
        values: Float[Array, "layers B K T H"],
        mesh: Mesh | None = None,
    ) -> Self:
        """Writes the keys and values of T new tokens, of all self-attention layers, from slot
        ``start`` on, which samples may have one each of."""
        return dataclasses.replace(
            self,
            keys=_write(self.keys, keys, start, mesh),
            values=_write(self.values, values, start, mesh),
            length=jnp.asarray(start + keys.shape[3], jnp.int32),
        )

    def with_images(
        self,
        keys: Float[Array, "cross_layers B K V H"],
        values: Float[Array, "cross_layers B K V H"],
    ) -> Self:
        """The cache with the images' keys and values, of all cross-attention layers."""
        num_image_tokens = keys.shape[3]
        room = [(0, 0)] * 3 + [(0, -num_image_tokens % IMAGE_TOKENS_MULTIPLE), (0, 0)]
        return dataclasses.replace(
            self,
            cross_keys=jnp.pad(keys.astype(self.keys.dtype), room),
            cross_values=jnp.pad(values.astype(self.values.dtype), room),
            num_image_tokens=num_image_tokens,
        )

    def with_slots(self, max_length: int) -> Self:
        """The cache with ``max_length`` slots, at least as many as it has."""
        room = [(0, 0)] * 3 + [(0, max_length - self.max_length), (0, 0)]
        return dataclasses.replace(
            self, keys=jnp.pad(self.keys, room), values=jnp.pad(self.values, room)
        )

    def split_over(self, mesh: Mesh | None) -> Self:
        """The cache inside a compiled function, its samples and heads split over a mesh."""
        axes = ("layers", "batch", "kv_heads", "length", "head_dim")
        stacks = ("keys", "values", "cross_keys", "cross_values")
        split: dict[str, Any] = {
            name: constrain(getattr(self, name), mesh, *axes)
            for name in stacks
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **split)

    def read(self, layer: Int[Array, ""]) -> tuple[Array, Array]:
        """A self-attention layer's keys and values, (B, K, S, H) each."""
        return _layer(self.keys, layer), _layer(self.values, layer)

    def read_images(self, layer: Int[Array, ""]) -> tuple[Array, Array]:
        """A cross-attention layer's keys and values, (B, K, V, H) each."""
        if self.cross_keys is None or self.cross_values is None:
            raise ValueError("the cache holds no images (num_image_tokens is 0)")
        keys, values = _layer(self.cross_keys, layer), _layer(self.cross_values, layer)
        return keys[:, :, : self.num_image_tokens], values[:, :, : self.num_image_tokens]


def _write(stack: Array, new: Array, start: Array, mesh: Mesh | None) -> Array:
    new = new.astype(stack.dtype)
    write = _write_rows if start.ndim else _write_all
    if mesh is None:
        return write(stack, new, start)
    # On each device for itself: what is laid out is else gathered on all of them first.
    batch, heads = partition_spec(("batch", "kv_heads"), stack.shape[1:3], mesh)
    split = PartitionSpec(None, batch, heads)
    starts = PartitionSpec(batch) if start.ndim else PartitionSpec()
    return jax.shard_map(write, mesh=mesh, in_specs=(split, split, starts), out_specs=split)(
        stack, new, start
    )


def _write_all(stack: Array, new: Array, start: Array) -> Array:
    """All samples at the same slots."""
    return _laid_out(jax.lax.dynamic_update_slice(stack, new, (0, 0, 0, start, 0)))


def _write_rows(stack: Array, new: Array, start: Array) -> Array:
    """One sample after the other: a scatter would copy the stack."""

    def write(row: Array, stack: Array) -> Array:
        tokens = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1)
        return _laid_out(jax.lax.dynamic_update_slice(stack, tokens, (0, row, 0, start[row], 0)))

    return jax.lax.fori_loop(0, stack.shape[1], write, stack)


def _laid_out(stack: Array) -> Array:
    # Left to itself, the TPU compiler lays the cache out for this small write, and copies all of it
    # for every layer that reads it.
    return with_layout_constraint(stack, Layout(tuple(range(stack.ndim))))


def _layer(stack: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
