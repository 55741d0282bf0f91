"""What a run works with, opened and checked before its first step."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import grain
import jax
from etils import epath

from mllama_jax.attention import AttentionKind
from mllama_jax.distributed import check_same_in_all_processes
from mllama_jax.execution import RematPolicy
from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.pretrained import Params
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.quantisation import Quantisation
from mllama_jax.sharding import num_parts
from mllama_jax.train.components import describe_trained, joined
from mllama_jax.train.config import ConfigError, TrainConfig
from mllama_jax.train.config_file import to_yaml
from mllama_jax.train.data.batches import HostBatch, make_dataset
from mllama_jax.train.data.placing import place_rows, rows_of_process
from mllama_jax.train.data.records import Record
from mllama_jax.train.data.sources import Sources, open_sources, read_records
from mllama_jax.train.digests import digests
from mllama_jax.train.lora import scaled
from mllama_jax.train.origin import Origin
from mllama_jax.train.step import Batch, TrainState, start


@dataclass(frozen=True)
class Job:
    """A run's parts that stay what they are.

    Attributes:
        config: of the run.
        sources: of conversations.
        held_out: questions that are never trained on.
        processor, model: of the checkpoint that training starts from.
        frozen: the parameters that are not trained.
        trained: a table of what is trained.
        rows: of every batch, those of this process.
    """

    config: TrainConfig
    sources: Sources
    held_out: Sequence[Record]
    processor: MllamaProcessor
    model: MllamaForConditionalGeneration
    frozen: Params
    trained: str
    rows: Sequence[int]

    @property
    def output(self) -> epath.Path:
        """The run's folder."""
        return epath.Path(self.config.output).expanduser()

    def batches(self) -> grain.DatasetIterator:
        """All batches of the run, from the first one on."""
        config = self.config
        dataset = make_dataset(
            *(self.sources, self.processor, config.data),
            steps=config.steps,
            seed=config.seed,
            rows=self.rows,
        )
        return iter(dataset)

    def placed(self, batch: HostBatch) -> Batch:
        """A batch on the devices."""
        return place_rows(batch.arrays, self.rows, self.config.data.batch_size, self.model.mesh)

    def origin(self) -> Origin:
        """What the run began with, to tell whether it goes on with the same."""
        frozen = sorted(digests(self.frozen).items())
        return Origin(
            len(self.sources),
            zlib.crc32(repr(self.sources.fingerprint).encode()),
            zlib.crc32(repr(frozen).encode()),
        )

    def whole_params(self, state: TrainState) -> Params:
        """What the model computes with now."""
        return joined(self.frozen, scaled(state.params, self.config.recipe.lora))


def open_job(config: TrainConfig) -> tuple[Job, TrainState]:
    """Opens the data and the model.

    Returns:
        The job, and the state before its first step.

    Raises:
        FileNotFoundError, ValueError: model, data or settings can't be used, or differ between
            the processes of a job; several processes without a mesh.
    """
    if config.mesh is None and jax.process_count() > 1:
        raise ConfigError(
            f"mesh=None in a job of {jax.process_count()} processes: expected a mesh of all "
            f"{jax.device_count()} devices, such as mesh=fsdp={jax.device_count()}"
        )
    sources, data = open_sources(config.data), config.data
    held_out: Sequence[Record] = []
    if data.held_out:
        held_out = read_records(data.held_out, data.held_out_format, data.cache)
    processor = MllamaProcessor.from_pretrained(config.model.path)
    model, params = MllamaForConditionalGeneration.from_pretrained(
        config.model.path,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        mesh=config.mesh,
        # TrainConfig checks these.
        attention=cast(AttentionKind, config.model.attention),
        remat=cast(RematPolicy, config.model.remat),
        quantise=cast(Quantisation | None, config.model.quantise),
    )
    model = model.clone(images_at_once=config.model.images_at_once)
    _check_batch(config, model)
    check_same_in_all_processes(
        "the configuration or the data of this run",
        [to_yaml(config), sources.fingerprint, *held_out],
        model.mesh,
    )
    state, frozen = start(model, params, config.recipe, config.seed)
    rows = rows_of_process(data.batch_size, model.mesh)
    trained = describe_trained(model, state.params, frozen)
    return Job(config, sources, held_out, processor, model, frozen, trained, rows), state


def _check_batch(config: TrainConfig, model: MllamaForConditionalGeneration) -> None:
    groups, microbatches = num_parts("batch", 0, model.mesh), config.optimizer.microbatches
    if config.data.batch_size % (groups * microbatches):
        each = f", each for optimizer.microbatches={microbatches}" if microbatches > 1 else ""
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} can't be split over the mesh {config.mesh}, "
            f"whose axes data and fsdp make {groups} groups{each}: expected a multiple of "
            f"{groups * microbatches}"
        )
