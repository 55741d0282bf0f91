"""What XLA's compiler for TPUs is told for training steps, by chip.

Its own choice where weights are split over devices is to multiply each part of them as it arrives
("windowed einsum"). The products that come of it are small: by the compiler's own schedules they
take 1.5 to 2 times as long on v6e, 1.4 times on v5e and v5p. Told not to, it gathers weights whole
while the chip computes; on v6e and v5p the sparse cores do that. On v5e gradients are still summed
up part by part: the compiler hides no sums of whole ones there, and waiting for them costs more.
"""

from collections.abc import Mapping

from mllama_jax.plan.hardware import chip_of

Options = Mapping[str, bool | int]

_WHOLE_BY_SPARSE_CORES: Options = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_all_gather_offload_tracing": True,
    "xla_tpu_enable_reduce_scatter_offload_tracing": True,
    "xla_tpu_enable_all_reduce_offload_tracing": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
}

COMPILER_OPTIONS: Mapping[str, Options] = {
    "v5e": {"xla_tpu_enable_windowed_einsum_for_all_gather": False},
    "v5p": _WHOLE_BY_SPARSE_CORES,
    "v6e": _WHOLE_BY_SPARSE_CORES,
}
"""By the chip's name; the compilers of others choose for themselves."""


def compiler_options(device_kind: str) -> Options:
    """Of a device as JAX names its kind."""
    chip = chip_of(device_kind)
    return {} if chip is None else COMPILER_OPTIONS.get(chip.name, {})
