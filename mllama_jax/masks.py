"""Attention masks, kept as small factors; `rows` builds the part that a block of queries needs.

True means "may attend". No mask is ever stored at its full size (queries × keys).
"""

from typing import Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp

from mllama_jax.shapes import Array, Bool, Int


@runtime_checkable
class Mask(Protocol):
    """What `mllama_jax.attention.attend` needs of a mask."""

    def rows(self, start: int | Array, size: int) -> Bool[Array, "#B size S"]:
        """The mask of ``size`` queries from query ``start`` on."""
        ...


@flax.struct.dataclass
class CausalMask:
    """A query sees its own slot and earlier ones, except those that hold padding.

    ``query_slots_T`` is the slot each query stands in; ``valid_BS`` is False for padding.
    """

    query_slots_T: Int[Array, "T"]
    valid_BS: Bool[Array, "B S"]

    def rows(self, start: int | Array, size: int) -> Bool[Array, "B size S"]:
        slots = jax.lax.dynamic_slice_in_dim(self.query_slots_T, start, size)
        causal = jnp.arange(self.valid_BS.shape[1]) <= slots[:, None]
        return causal[None] & self.valid_BS[:, None, :]


@flax.struct.dataclass
class TileMask:
    """A query sees all tokens of the image tiles that it may attend to.

    ``tiles_BTL`` has one column for each tile slot of each image (``M * L`` of them).
    """

    tiles_BTL: Bool[Array, "B T ML"]
    tokens_per_tile: int = flax.struct.field(pytree_node=False)

    def rows(self, start: int | Array, size: int) -> Bool[Array, "B size V"]:
        tiles = jax.lax.dynamic_slice_in_dim(self.tiles_BTL, start, size, axis=1)
        return jnp.repeat(tiles, self.tokens_per_tile, axis=2)


@flax.struct.dataclass
class PaddingPairMask:
    """Forbids only (padding query, padding key) pairs, as the vision encoder was trained.

    Real tokens do attend to padding, and padding to real tokens.
    Source: llama-models 0.3.0, multimodal/encoder_utils.py: build_encoder_attention_mask.
    """

    padding_BE: Bool[Array, "B E"]

    def rows(self, start: int | Array, size: int) -> Bool[Array, "B size E"]:
        queries = jax.lax.dynamic_slice_in_dim(self.padding_BE, start, size, axis=1)
        return ~(queries[:, :, None] & self.padding_BE[:, None, :])
