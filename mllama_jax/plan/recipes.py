"""Jobs that a training run's configuration describes."""

from mllama_jax.flops import PartFlops, image_length
from mllama_jax.plan.job import Job
from mllama_jax.plan.programs import Model
from mllama_jax.train.config import TrainConfig
from mllama_jax.train.config_file import from_yaml, to_yaml
from mllama_jax.train.flops import Counts, step_flops
from mllama_jax.train.settings import LoraConfig, Recipe, TrainedConfig

_STEPS = 1000  # of the run: they only shape the learning rate


def job_of(config: TrainConfig, topology: str, images: int) -> Job:
    """The training step of a run, on a batch of its longest rows.

    Args:
        config: of the run.
        topology: as `Job` has it.
        images: of each sample; packed rows have the configuration's ``data.max_images``.
    """
    is_full = "full" in config.trained.modes.values()
    model, data = config.model, config.data
    return Job(
        model=model.path,
        task="train" if is_full else "lora",
        topology=topology,
        mesh=config.mesh or "data=1",
        batch=data.batch_size,
        length=data.lengths[-1],
        images=data.max_images if data.packing else images,
        remat=model.remat,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        attention=model.attention,
        images_at_once=model.images_at_once,
        rank=config.lora.rank,
        quantise=model.quantise,  # type: ignore[arg-type]  # TrainConfig checks it
        config=to_yaml(config),
    )


def recipe_of(job: Job) -> Recipe:
    """What decides what the job's step does, beside the model."""
    if job.config is not None:
        return from_yaml(job.config).recipe
    preset = "lora" if job.task == "lora" else "all"
    return Recipe(_STEPS, trained=TrainedConfig(preset), lora=LoraConfig(rank=job.rank))


def is_packed(job: Job) -> bool:
    """Whether rows hold several texts."""
    return job.config is not None and from_yaml(job.config).data.packing


def recipe_flops(job: Job, model: Model) -> dict[str, PartFlops]:
    """Of a step on full rows, each one text that sees all of its pictures and is all learned."""
    batch, length = job.batch or 1, job.length or 1
    tokens, of_image = batch * length, image_length(model.full_config)
    counts = Counts(
        tokens=tokens,
        pairs=batch * length * (length + 1) // 2,
        labels=tokens,
        seeing=tokens if job.images else 0,
        images=batch * job.images,
        image_tokens=batch * job.images * of_image,
        seen=tokens * job.images * of_image,
    )
    found = step_flops(model, recipe_of(job))
    parts = {
        "self-attention layers": found.tokens * counts.tokens,
        "head": found.labels * counts.labels,
        "attention to text": found.pairs * counts.pairs,
        "cross-attention layers": found.seeing * counts.seeing,
        "attention to pictures": found.seen * counts.seen,
        "image keys and values": found.image_tokens * counts.image_tokens,
        "vision encoder and projector": found.images * counts.images,
    }
    return {name: PartFlops(flops) for name, flops in parts.items()}  # type: ignore[arg-type]
