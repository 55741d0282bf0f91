"""Shapes and dtypes that annotations promise are checked at run time, in tests only."""

import os

from processes import cpu_devices

# libtpu, which the planner's tests compile with, would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.update(cpu_devices(1))

import jax
import pytest
from jaxtyping import install_import_hook

jax.devices()  # reads the flags; libtpu would end the process at those it does not know
del os.environ["XLA_FLAGS"]

CHECKED = (
    *("attention", "decoder", "loss", "masks", "rope"),
    *("generation.decoding", "generation.sampling"),
    *("batch.rules", "batch.sampling", "batch.windows"),
)

install_import_hook([f"mllama_jax.{module}" for module in CHECKED], "beartype.beartype")


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory):
    """The released tokenizer, a chat template and settings for tiny tiles."""
    from processor_folders import write_folder

    return write_folder(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="session")
def processor(processor_folder):
    from mllama_jax import MllamaProcessor

    return MllamaProcessor.from_pretrained(processor_folder)


@pytest.fixture(scope="session")
def hf_processor(processor_folder):
    """What transformers makes of the same folder. Its tokenizer is changed by calls."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor
    from transformers.models.mllama.processing_mllama import MllamaProcessor

    image_processor = MllamaImageProcessor.from_pretrained(processor_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(processor_folder)
    template = (processor_folder / "chat_template.jinja").read_text()
    return MllamaProcessor(image_processor, tokenizer, chat_template=template)
