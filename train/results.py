"""What a run leaves: a model folder, adapters, and settings that others read."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from etils import epath

from mllama_jax.cloud import is_cloud
from mllama_jax.generation.config import GenerationConfig
from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.pretrained import Params
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.train.adapters_export import (
    finished,
    only_adapters,
    save_adapters,
    trained_beside_adapters,
)
from mllama_jax.train.job import Job
from mllama_jax.train.step import TrainState

_COPIED_BYTES = 2**24


def save_results(job: Job, state: TrainState) -> str:
    """Writes model/ and, where only adapters were trained, adapter/; returns what there is now."""
    config, model, output = job.config, job.model, job.output
    said = []
    if only_adapters(state.params):
        save_adapters(
            output / "adapter", model, state.params, config.recipe.lora, config.model.path
        )
        said.append(f"The adapters are in {output / 'adapter'}, as PEFT loads them.")
    elif beside := trained_beside_adapters(model, state.params):
        said.append(
            f"There is no adapter folder: what was trained as a whole ({', '.join(beside)}) has no "
            "place in it."
        )
    if jax.process_count() > 1:
        said.append(_without_model(output, is_whole=not job.frozen))
    else:
        whole = finished(model, job.frozen, state.params, config.recipe.lora, config.model)
        with _writable(output / "model") as folder:
            save_model(folder, *whole, job.processor)
        said.append(f"The model is in {output / 'model'}.")
    return "\n".join(said)


@contextmanager
def _writable(folder: epath.Path) -> Iterator[epath.Path]:
    """The folder; of one in a bucket a copy on this machine, whose files are sent there at the
    end: weights are written at many places of a file."""
    if not is_cloud(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mllama_jax_") as local:
        yield epath.Path(local)
        for file in sorted(Path(local).iterdir()):
            with file.open("rb") as source, (folder / file.name).open("wb") as target:
                shutil.copyfileobj(source, target, _COPIED_BYTES)


def _without_model(output: epath.Path, is_whole: bool) -> str:
    """What becomes of a job of several processes, of which none can write the whole model."""
    if not is_whole:
        return (
            f"What was trained is in {output / 'checkpoints'}. Started again in one process, on a "
            "mesh of its own devices, the run only adds what was not and writes the model folder."
        )
    return (
        f"The parameters are in {output / 'checkpoints'}; `mllama-jax convert {output} FOLDER` "
        "makes a model folder of them."
    )


def save_model(
    folder: epath.PathLike,
    model: MllamaForConditionalGeneration,
    params: Params,
    processor: MllamaProcessor,
) -> None:
    """Writes all that a Hugging Face folder holds: what `from_pretrained` reads, here and there."""
    model.save_pretrained(params, folder)
    save_settings(folder, model, processor)


def save_settings(
    folder: epath.PathLike, model: MllamaForConditionalGeneration, processor: MllamaProcessor
) -> None:
    """Writes tokenizer, chat template, image processor settings and generation settings."""
    processor.save_pretrained(folder)
    generation = model.generation_config or GenerationConfig.from_model_config(model.full_config)
    generation.save_pretrained(folder)
