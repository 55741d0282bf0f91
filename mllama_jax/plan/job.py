"""What is to be planned, and what stands for that which nobody asked for."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import jax
from jax.sharding import Mesh

from mllama_jax.attention import ATTENTION_KINDS
from mllama_jax.configs import MllamaConfig
from mllama_jax.execution import REMAT_POLICIES
from mllama_jax.generation.decoding import IMAGE_BUCKETS, LENGTH_BUCKETS, bucket
from mllama_jax.plan.models import num_parameters
from mllama_jax.plan.topology import Topology
from mllama_jax.quantisation import LARGEST, Quantisation
from mllama_jax.sharding import num_parts

Task = Literal["train", "lora", "prefill", "decode", "vision"]
TASKS: tuple[str, ...] = get_args(Task)
DTYPES = ("float32", "bfloat16", "float16")

DEFAULT_LENGTH: Mapping[str, int] = {
    "train": 2048,
    "lora": 2048,
    "prefill": 2048,
    "decode": 4096,
    "vision": 0,
}
"""Tokens: of a sample; of a prompt; of a cache, prompt and answer together."""
_PARAMETERS_AT_MOST = 0.75  # of a device's memory in generation: caches need some, too
ROWS_A_GROUP: Mapping[str, int] = {"train": 1, "lora": 1, "prefill": 1, "decode": 16, "vision": 1}
"""Samples for each group of devices that share samples."""


@dataclass(frozen=True)
class Job:
    """A job on a topology. None stands for a default that depends on the rest (`resolved`).

    Attributes:
        model: "11b", "90b", or a folder with a config.json.
        task: one of `TASKS`.
        topology: kind and shape of the devices, such as "v5e:4x4" or, of two slices, "v5e:4x4*2".
        mesh: how they are divided, such as "data=2,fsdp=8".
        batch: samples of a step on all devices together; for "vision", pictures.
        length: text tokens of a sample; for "decode", slots of the cache.
        images: of a sample, each of as many tiles as the model takes; 0 for text alone.
        remat: rematerialisation in training, one of `mllama_jax.execution.REMAT_POLICIES`.
        dtype: of the computation.
        param_dtype: of the parameters; for "lora", of the frozen ones.
        attention: a kind of `mllama_jax.attention`.
        images_at_once: pictures that a device encodes at a time in training; None for all its own.
        rank: of LoRA's adapters.
        quantise: how the weights of the decoder's layers are stored, a kind of
            `mllama_jax.quantisation`; in training only those that adapters stand beside.
        config: of a training run, whole and as YAML: what else decides its step (`job_of` in
            `mllama_jax.plan.recipes`). None trains everything with AdamW, or adapters of the
            decoder.
    """

    model: str = "11b"
    task: Task = "train"
    topology: str = "v5e:4x4"
    mesh: str | None = None
    batch: int | None = None
    length: int | None = None
    images: int = 1
    remat: str | None = None
    dtype: str = "bfloat16"
    param_dtype: str | None = None
    attention: str | None = None
    images_at_once: int | None = None
    rank: int = 16
    quantise: Quantisation | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        choices = {
            "task": TASKS,
            "remat": (None, *REMAT_POLICIES),
            "attention": (None, *ATTENTION_KINDS),
            "dtype": DTYPES,
            "param_dtype": (None, *DTYPES),
            "quantise": (None, *LARGEST),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                names = ", ".join(choice for choice in known if choice)
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {names}")
        least = {"batch": 1, "length": 1, "images": 0, "images_at_once": 1, "rank": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest and (name, self.task) != ("length", "vision"):
                raise ValueError(f"{name}={value}: expected at least {smallest}")
        if self.quantise and self.trains and self.config is None:
            raise ValueError(
                f"quantise={self.quantise!r}: quantised weights are not trained, so it is for "
                "tasks 'prefill', 'decode' and 'vision'"
            )
        if self.task == "vision" and self.images != 1:
            raise ValueError("task 'vision' has one picture a sample: say how many with batch")

    @property
    def trains(self) -> bool:
        return self.task in ("train", "lora")


def resolved(job: Job, config: MllamaConfig, topology: Topology) -> tuple[Job, Mesh]:
    """The job with every default filled in, and its mesh.

    Without a mesh, training splits everything over all devices (fsdp), and over several slices the
    samples alone (data). Generation splits heads (tensor) over as many devices as there are
    key/value heads, or as hold the parameters; what is left of the devices takes other rows (data).

    Args:
        config: of the job's model.
        topology: parsed from the job's.

    Raises:
        ValueError: the mesh is not made of the topology's devices, or does not divide the batch.
    """
    job = dataclasses.replace(
        job,
        topology=topology.name,
        remat=job.remat or ("full" if job.trains else "none"),
        param_dtype=job.param_dtype or ("float32" if job.task == "train" else "bfloat16"),
        attention=job.attention or ("cudnn" if topology.chip.is_gpu else "splash"),
        length=_length(job),
    )
    mesh = topology.mesh(job.mesh or _default_mesh(job, config, topology))
    written = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    groups = num_parts("batch", 0, mesh)
    batch = job.batch or ROWS_A_GROUP[job.task] * groups
    if batch % groups:
        raise ValueError(
            f"batch={batch} can't be split evenly over the mesh {written}, whose axes data and "
            f"fsdp make {groups} groups: expected a multiple of {groups}"
        )
    images = job.images
    if job.task in ("prefill", "decode") and images:
        images = bucket(images, IMAGE_BUCKETS)
    return dataclasses.replace(job, mesh=written, batch=batch, images=images), mesh


def _length(job: Job) -> int:
    length = job.length or DEFAULT_LENGTH[job.task]
    if job.task in ("prefill", "decode"):
        return bucket(length, LENGTH_BUCKETS)  # generation compiles for no others
    return length


def _default_mesh(job: Job, config: MllamaConfig, topology: Topology) -> str:
    devices, slices = topology.num_devices, topology.slices
    in_slice = devices // slices
    if job.trains:
        return f"fsdp={devices}" if slices == 1 else f"data={slices},fsdp={in_slice}"
    if job.task == "vision":
        return f"data={devices}"
    text = config.text_config
    room = _PARAMETERS_AT_MOST * topology.chip.usable_bytes
    size = num_parameters(config) * jax.numpy.dtype(job.param_dtype or job.dtype).itemsize
    tensor = 1
    while (tensor < text.num_key_value_heads or size / tensor > room) and (
        in_slice % (2 * tensor) == 0 and text.num_attention_heads % (2 * tensor) == 0
    ):
        tensor *= 2
    return f"tensor={tensor}" if tensor == devices else f"data={devices // tensor},tensor={tensor}"
