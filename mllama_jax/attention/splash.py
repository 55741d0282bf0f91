"""Kind ``splash``: JAX's fused attention kernels for TPUs, forward and backward.

No score leaves the chip's fast memory. Blocks that no query of theirs may attend to are skipped,
also where only the run shows which these are.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import Mesh

from mllama_jax.attention.blocks import Blocks, choose_blocks
from mllama_jax.attention.columns import with_end_column, with_padding_columns
from mllama_jax.attention.names import ATTENTION_RESULT
from mllama_jax.attention.on_mesh import check_platform, on_mesh
from mllama_jax.masks import CausalMask, KeyRule, Mask, PaddingPairMask, TileMask, UpToKey
from mllama_jax.shapes import Array, Bool, Float, Int


def attend_splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None,
    mesh: Mesh | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`mllama_jax.attention.attend` by the fused kernels.

    On a mesh every device computes its own samples (axes data and fsdp) and heads (axis tensor).

    Args:
      interpret: run the kernels operation by operation, on any device: slow, for tests.

    Raises:
      ValueError: the devices are not TPUs; or the mask is one that the kernels can't take.
    """
    if not interpret:
        check_platform("splash", mesh)
    kernel = partial(_attend, interpret=interpret)
    if mesh is None:
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask)
    return on_mesh(kernel, q_BTNH, k_BSKH, v_BSKH, mask, mesh)


class _KernelMask(NamedTuple):
    """What of a mask the kernels compute themselves.

    Attributes:
      rule: applied to ``codes_BT``; None if all keys may be attended to.
      codes_BT: one for each query, (B or 1, T).
      segments: of queries (B, T) and keys (B, S): only equal ones attend to each other.
    """

    rule: KeyRule | None
    codes_BT: Int[Array, "#B T"] | None
    segments: kernels.SegmentIds | None


def _attend(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: Mask | None, interpret: bool
) -> Array:
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    S = k_BSKH.shape[1]
    blocks = _choose_blocks(q_BTNH, S, mask)
    # The kernels don't scale. The product is rounded to the queries' dtype only once.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    kernel_mask = _kernel_mask(mask, T, S, padded=blocks.num_keys > S)
    if isinstance(mask, PaddingPairMask):
        q_BTNH, k_BSKH = with_padding_columns(q_BTNH, k_BSKH, mask, scale=1.0)
    q_BTNH = _pad(q_BTNH, blocks.num_queries, 0)
    k_BSKH, v_BSKH = (_pad(x, blocks.num_keys, 0) for x in (k_BSKH, v_BSKH))
    if kernel_mask.rule is None and blocks.num_keys > S:
        q_BTNH, k_BSKH = with_end_column(q_BTNH, k_BSKH, S)
    out = _run_kernels(q_BTNH, k_BSKH, v_BSKH, _padded(kernel_mask, blocks), blocks, interpret)
    out = out[:, :T]
    if mask is None:
        return out
    # The kernels average over all keys where none is allowed. What is zeroed here has no gradient.
    return jnp.where(mask.sees_a_key()[:, :, None, None], out, 0)


def _choose_blocks(q_BTNH: Array, num_keys: int, mask: Mask | None) -> Blocks:
    return choose_blocks(
        q_BTNH.shape[1],
        num_keys,
        q_BTNH.dtype.itemsize,
        causal=isinstance(mask, CausalMask),
        keys_skipped_together=mask.tokens_per_tile if isinstance(mask, TileMask) else None,
    )


def _kernel_mask(mask: Mask | None, T: int, S: int, padded: bool) -> _KernelMask:
    if isinstance(mask, PaddingPairMask):
        return _KernelMask(None, None, None)
    if isinstance(mask, TileMask):
        return _KernelMask(mask.rule, mask.codes(), None)
    if isinstance(mask, CausalMask):
        keys_BS = mask.valid_BS.astype(jnp.int32)
        queries_BT = mask.query_segments_BT
        if queries_BT is None:
            keys_BS = jnp.where(keys_BS != 0, 1, _NO_SEGMENT)
            queries_BT = jnp.ones((keys_BS.shape[0], T), jnp.int32)
        keys_BS = jnp.where(keys_BS == 0, _NO_SEGMENT, keys_BS)
        return _KernelMask(mask.rule, mask.codes(), kernels.SegmentIds(queries_BT, keys_BS))
    if mask is None:
        rule = UpToKey() if padded else None
        return _KernelMask(rule, jnp.full((1, T), S - 1, jnp.int32) if padded else None, None)
    raise ValueError(f"attention='splash' can't take a {type(mask).__name__}: choose 'xla'")


# The segment of keys that no query may attend to: padding is 0 in the queries' segments.
_NO_SEGMENT = -1


def _padded(mask: _KernelMask, blocks: Blocks) -> _KernelMask:
    rule, codes_BT, segments = mask
    if codes_BT is not None:
        codes_BT = _pad(codes_BT, blocks.num_queries, 0)
    if segments is not None:
        segments = kernels.SegmentIds(
            _pad(segments.q, blocks.num_queries, 0), _pad(segments.kv, blocks.num_keys, _NO_SEGMENT)
        )
    return _KernelMask(rule, codes_BT, segments)


def _pad(x: Array, length: int, value: int) -> Array:
    """Fills axis 1 up to a length."""
    missing = length - x.shape[1]
    return jnp.pad(x, [(0, missing if i == 1 else 0) for i in range(x.ndim)], constant_values=value)


def _run_kernels(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: _KernelMask, blocks: Blocks, interpret: bool
) -> Array:
    rule, codes_BT, segments = mask
    per_sample = codes_BT is not None and codes_BT.shape[0] > 1
    codes = codes_BT if codes_BT is None or per_sample else codes_BT[0]

    @partial(jax.vmap, in_axes=(0, 0, 0, 0 if per_sample else None, 0))
    def sample(
        q_TNH: Array, k_SKH: Array, v_SKH: Array, codes_T: Array | None, segments: Any
    ) -> Array:
        over_keys, over_queries = (_mask_info(rule, codes_T, blocks, axis) for axis in (1, 0))
        kernel = kernels.SplashAttentionKernel(
            over_keys,
            None if blocks.fused_backward else over_keys,
            over_queries,
            block_sizes=blocks.sizes(),
            is_mqa=False,
            save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=ATTENTION_RESULT,
            mask_function=rule,
            interpret=interpret,
        )
        heads_first = (x.swapaxes(0, 1) for x in (q_TNH, k_SKH, v_SKH))
        out: Any = kernel(*heads_first, segments)
        return out.swapaxes(0, 1)

    return sample(q_BTNH, k_BSKH, v_BSKH, codes, segments)


def _mask_info(
    rule: KeyRule | None, codes_T: Int[Array, "T"] | None, blocks: Blocks, walked_axis: int
) -> MaskInfo:
    """Codes, and the blocks to compute, in a kernel that walks over ``walked_axis`` innermost."""
    if rule is None or codes_T is None:
        return MaskInfo(None, None, None, None, None)
    first_J = jnp.arange(0, blocks.num_keys, blocks.keys)
    codes_IQ = codes_T.reshape(-1, blocks.queries)
    needed_IJ = rule.allows_some(codes_IQ, first_J, first_J + blocks.keys - 1)
    # Queries without a key need some block all the same: the kernels divide by the softmax's sum.
    needed_IJ = needed_IJ.at[:, 0].set(needed_IJ[:, 0] | ~needed_IJ.any(1))
    return MaskInfo(
        data_next=_blocks_to_hold(needed_IJ, walked_axis)[None],
        mask_next=None,
        block_mask=needed_IJ.astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=codes_T,  # type: ignore[arg-type]
    )


def _blocks_to_hold(needed_IJ: Bool[Array, "I J"], axis: int) -> Int[Array, "I J"]:
    """The index of the block to hold in each step: skipped steps keep the last one computed."""
    index = jax.lax.broadcasted_iota(jnp.int32, needed_IJ.shape, axis)
    held = jax.lax.cummax(jnp.where(needed_IJ, index, -1), axis=axis)
    first = jnp.argmax(needed_IJ, axis=axis, keepdims=True).astype(jnp.int32)
    return jnp.where(held < 0, first, held)
