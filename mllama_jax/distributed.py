"""Jobs of several processes: one on each host, all of them running the same command."""

import importlib.util
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def job_around(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, as far as the environment says; None if alone.

    Cloud TPUs count as several even where a slice has one host: joining is then joining oneself.

    Args:
        environment: such as ``os.environ``.
    """
    sizes = {
        "the environment": "JAX_NUM_PROCESSES",
        "Slurm": "SLURM_STEP_NUM_TASKS",  # of srun; a batch script alone has 1
        "Open MPI": "OMPI_COMM_WORLD_SIZE",
    }
    for name, variable in sizes.items():
        if environment.get(variable, "1") != "1":
            return name
    if environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and _has_tpu():
        return "Cloud TPU"
    return None


def _has_tpu() -> bool:
    has_library = importlib.util.find_spec("libtpu") is not None
    return has_library and any(map(os.path.exists, _TPU_DEVICES))


def join_if_any(must: bool = False) -> None:
    """`join_processes`, if this is one of several processes as far as `job_around` knows.

    Says what was found: how many there are, and of how many devices.

    Args:
        must: it is one of several, whatever is known.

    Raises:
        ValueError: as `join_processes`.
    """
    around = job_around(os.environ)
    if must or around:
        join_processes()
        found = f" ({around} says so)" if around else ""
        print(
            f"Process {jax.process_index()} of {jax.process_count()}{found}, with "
            f"{jax.local_device_count()} of {jax.device_count()} devices",
            flush=True,
        )


def join_processes() -> None:
    """Makes this process one of the job's, which then sees the devices of all of them.

    JAX finds the others by itself on Cloud TPUs, under Slurm and Open MPI, and in Kubernetes with
    the package ``kubernetes`` (``jax[k8s]``). Elsewhere the environment has to say
    ``JAX_COORDINATOR_ADDRESS`` (host:port of the first process), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID``. Call it before anything else of JAX.

    The standard output of all processes but the first is dropped: people want to read it once.

    Raises:
        ValueError: there is no such job, or the environment says only a part.
    """
    given = [name for name in _BY_HAND if name in os.environ]
    try:
        if len(given) == len(_BY_HAND):
            address, count, index = (os.environ[name] for name in _BY_HAND)
            jax.distributed.initialize(address, int(count), int(index))
        elif set(given) <= {_BY_HAND[0]}:
            jax.distributed.initialize()
        else:
            raise ValueError(f"only {' and '.join(given)} set")
    except ValueError as error:
        raise ValueError(
            f"the processes of this job can't be found ({error}): on machines that JAX does not "
            f"know, set {', '.join(_BY_HAND)} in each process"
        ) from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process runs)


def check_same_in_all_processes(what: str, values: Sequence[Any], mesh: Mesh | None) -> None:
    """Raises ValueError in every process of a mesh unless all of them have the same values.

    Args:
        what: their name in the message.
        values: NumPy arrays, and what has a `repr`.
    """
    if mesh is None or len({device.process_index for device in mesh.devices.flat}) == 1:
        return
    checksum = 0
    for value in values:
        if isinstance(value, np.ndarray):
            checksum = zlib.crc32(f"{value.dtype}{value.shape}".encode(), checksum)
            checksum = zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data, checksum)
        else:
            checksum = zlib.crc32(repr(value).encode(), checksum)
    # One checksum a device, the same on all devices of a process.
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    checksums = jax.make_array_from_callback(
        (mesh.size,), sharding, lambda index: np.full(mesh.size, checksum, np.uint32)[index]
    )
    if not bool(_all_equal(checksums)):
        raise ValueError(
            f"{what} differ between the processes of this job: give all of them the same (each "
            "takes its own part)"
        )


@jax.jit
def _all_equal(values: jax.Array) -> jax.Array:
    return values.min() == values.max()
