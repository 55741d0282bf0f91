"""NVIDIA GPUs that need not be there: what their compiler has to be told of them."""

import importlib.util

import jax
from jax.experimental import topologies

_H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  device_interconnect_info { active_links: 18 }
  runtime_version: "12.8.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""Limits of compute capability 9.0 and of the SXM5 module, as NVIDIA publishes them."""


def gpu_devices(number: int) -> list[jax.Device]:
    """H100s of one host for their compiler; they can't run anything.

    Raises:
        ImportError: the compiler is not installed.
    """
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ImportError(
            "planning for NVIDIA GPUs needs their compiler, which needs no GPU: "
            "pip install 'mllama-jax[cuda]'"
        )
    description = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1 x 1 x {number}", target_config=_H100
    )
    return list(description.devices)
