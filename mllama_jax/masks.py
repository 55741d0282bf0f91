"""Attention masks, kept as small factors; `rows` builds the part that a block of queries needs.

True means "may attend". No mask is ever stored at its full size (queries × keys).
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp

from mllama_jax.shapes import Array, Bool, Float, Int

MAX_TILES_IN_A_CODE = 32


@runtime_checkable
class Mask(Protocol):
    """What `mllama_jax.attention.attend` needs of a mask."""

    def rows(self, start: int | Array, size: int) -> Bool[Array, "#B size S"]:
        """The mask of ``size`` queries from query ``start`` on."""
        ...

    def sees_a_key(self) -> Bool[Array, "#B T"]:
        """Which queries may attend to anything at all."""
        ...

    def bias(self) -> Float[Array, "B S"] | None:
        """What is added to all scores of a key, float32; None adds nothing."""
        ...


@runtime_checkable
class KeyRule(Protocol):
    """Says from one int32 a query which keys it may attend to, inside a kernel or outside.

    A rule is hashable and knows no arrays; ``codes`` of queries and key indices broadcast.
    """

    def __call__(self, codes: Int[Array, "..."], keys: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether queries of these codes may attend to the keys of these indices."""
        ...

    def allows_some(
        self, codes_IQ: Int[Array, "I Q"], first_J: Int[Array, "J"], last_J: Int[Array, "J"]
    ) -> Bool[Array, "I J"]:
        """False where no query of a block may attend to any key from ``first`` to ``last``."""
        ...


@dataclass(frozen=True)
class UpToKey:
    """A code is the index of the last key that the query may attend to."""

    def __call__(self, codes: Int[Array, "..."], keys: Int[Array, "..."]) -> Bool[Array, "..."]:
        return keys <= codes

    def allows_some(
        self, codes_IQ: Int[Array, "I Q"], first_J: Int[Array, "J"], last_J: Int[Array, "J"]
    ) -> Bool[Array, "I J"]:
        return first_J <= codes_IQ.max(1)[:, None]


@dataclass(frozen=True)
class KeysOfTiles:
    """Bit i of a code says whether the query may attend to the keys of tile i."""

    num_tiles: int
    tokens_per_tile: int

    def __call__(self, codes: Int[Array, "..."], keys: Int[Array, "..."]) -> Bool[Array, "..."]:
        # A product in float32 is exact here, and vector units have no integer division.
        tiles = ((keys.astype(jnp.float32) + 0.5) * (1 / self.tokens_per_tile)).astype(jnp.int32)
        allowed = ((codes >> tiles) & 1) != 0
        if self.num_tiles == MAX_TILES_IN_A_CODE:  # keys behind the last tile would be no bit
            allowed &= keys < self.num_tiles * self.tokens_per_tile
        return allowed

    def allows_some(
        self, codes_IQ: Int[Array, "I Q"], first_J: Int[Array, "J"], last_J: Int[Array, "J"]
    ) -> Bool[Array, "I J"]:
        tiles = jnp.arange(self.num_tiles)
        used_IL = ((codes_IQ[:, :, None] >> tiles) & 1).any(1)
        starts = tiles * self.tokens_per_tile
        overlaps_JL = (starts <= last_J[:, None]) & (
            first_J[:, None] < starts + self.tokens_per_tile
        )
        return (used_IL[:, None] & overlaps_JL).any(-1)


@flax.struct.dataclass
class CausalMask:
    """A query sees its own slot and earlier ones, except padding and other segments.

    Attributes:
      query_slots: the slot that each query stands in, (T,), or (B, T) where samples differ.
      valid_BS: False or 0 for slots that hold padding; or int32 segments, where several texts
        are packed into one row.
      query_segments_BT: the segment of each query, which sees slots of the same segment only (and
        nothing if it is 0); None stands for all segments.
    """

    query_slots: Int[Array, "T"] | Int[Array, "B T"]
    valid_BS: Bool[Array, "B S"] | Int[Array, "B S"]
    query_segments_BT: Int[Array, "B T"] | None = None

    def rows(self, start: int | Array, size: int) -> Bool[Array, "B size S"]:
        slots = jax.lax.dynamic_slice_in_dim(self.query_slots, start, size, axis=-1)
        allowed = (jnp.arange(self.valid_BS.shape[1]) <= slots[..., None]) & (
            self.valid_BS[:, None, :] != 0
        )
        if self.query_segments_BT is None:
            return allowed
        segments = jax.lax.dynamic_slice_in_dim(self.query_segments_BT, start, size, axis=1)
        return allowed & (segments[:, :, None] == self.valid_BS[:, None, :])

    def sees_a_key(self) -> Bool[Array, "B T"]:
        if self.query_segments_BT is None:
            num_slots = self.valid_BS.shape[1]
            first_B = jnp.where(self.valid_BS != 0, jnp.arange(num_slots), num_slots).min(1)
            return first_B[:, None] <= self.query_slots
        # One reduction; the compiler does not store what it reduces.
        return self.rows(0, self.query_slots.shape[-1]).any(-1)

    def bias(self) -> None:
        return None

    def codes(self) -> Int[Array, "#B T"]:
        """For `rule`, which leaves out padding and segments."""
        return jnp.atleast_2d(self.query_slots).astype(jnp.int32)

    @property
    def rule(self) -> UpToKey:
        return UpToKey()


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

    def sees_a_key(self) -> Bool[Array, "B T"]:
        return self.tiles_BTL.any(-1)

    def bias(self) -> None:
        return None

    def codes(self) -> Int[Array, "B T"]:
        """For `rule`.

        Raises:
          ValueError: more tile slots than an int32 has bits.
        """
        num_tiles = self.tiles_BTL.shape[2]
        if num_tiles > MAX_TILES_IN_A_CODE:
            raise ValueError(
                f"the images of a sample have {num_tiles} tile slots, a fused kernel takes up to "
                f"{MAX_TILES_IN_A_CODE}: use fewer images a sample or attention='xla'"
            )
        bits = jnp.uint32(1) << jnp.arange(num_tiles, dtype=jnp.uint32)
        codes = jnp.where(self.tiles_BTL, bits, 0).sum(-1, dtype=jnp.uint32)
        return jax.lax.bitcast_convert_type(codes, jnp.int32)

    @property
    def rule(self) -> KeysOfTiles:
        return KeysOfTiles(self.tiles_BTL.shape[2], self.tokens_per_tile)


@flax.struct.dataclass
class PaddingPairMask:
    """Forbids only (padding query, padding key) pairs, as the vision encoder was trained.

    Real tokens do attend to padding, and padding to real tokens.
    Source: llama-models 0.3.0, multimodal/encoder_utils.py: build_encoder_attention_mask.

    Attributes:
      padding_BE: True for padding.
      counts_BE: how many keys just like it each key stands for, float32, at least 1; None: itself.
    """

    padding_BE: Bool[Array, "B E"]
    counts_BE: Float[Array, "B E"] | None = None

    def rows(self, start: int | Array, size: int) -> Bool[Array, "B size E"]:
        queries = jax.lax.dynamic_slice_in_dim(self.padding_BE, start, size, axis=1)
        return ~(queries[:, :, None] & self.padding_BE[:, None, :])

    def sees_a_key(self) -> Bool[Array, "B E"]:
        return ~(self.padding_BE & self.padding_BE.all(1, keepdims=True))

    def bias(self) -> Float[Array, "B E"] | None:
        # exp(score + log(n)) is n times exp(score).
        return None if self.counts_BE is None else jnp.log(self.counts_BE)
