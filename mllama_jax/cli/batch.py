"""``mllama-jax batch``: a file of requests, or a folder of pictures, answered into a file."""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import tyro

from mllama_jax.cli.answering import NOT_RUN, leave
from mllama_jax.cli.batch_run import BatchOptions, run_batch
from mllama_jax.cli.options import Attention, Dtype, Quantise


def batch(
    output_file: Annotated[Path, tyro.conf.arg(aliases=("-o",), metavar="FILE")],
    input_file: Annotated[Path | None, tyro.conf.arg(aliases=("-i",), metavar="FILE")] = None,
    model: str | None = None,
    image_folder: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    prompt: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    allow_folder: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = (),
    allow_remote: bool = False,
    retry_errors: bool = False,
    grace: float = 30.0,
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    metrics: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    num_slots: int | None = None,
    max_length: int | None = None,
    max_tiles: int | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "xla",
    quantise: Quantise | None = None,
    mesh: str | None = None,
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None,
    distributed: bool = False,
    merge: bool = False,
    compilation_cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    date: str | None = None,
    revision: str | None = None,
) -> None:
    """Answer a file of requests, or ask the same about every picture of a folder.

    Requests are lines of OpenAI's batch API, as `vllm run-batch` reads them; results are written
    in its form, each as soon as it is there. Stopped or killed at any moment, the same command
    carries on. The exit status is 0 if every request was answered, 1 if some have an error for
    their result, 2 if the job could not run, 130 or 143 if SIGINT or SIGTERM stopped it.

    For example:
      $ mllama-jax batch --model FOLDER -i requests.jsonl -o results.jsonl
      $ mllama-jax batch --model FOLDER --image-folder DIR --prompt "What is this?" -o results.jsonl

    Args:
        output_file: where results go, a line each, in the order in which they finish.
        input_file: requests, a line each.
        model: Hugging Face folder or hub id.
        image_folder: instead of a file of requests: a folder of pictures.
        prompt: what to ask about each of them.
        max_tokens: the longest answer to requests that don't say it; as many tokens as there is
            room for, if these are fewer.
        temperature: of requests that don't say it; 0 takes the most likely token.
        seed: of requests that don't say it; otherwise each has one that its custom_id gives.
        allow_folder: requests may read pictures in it, and in folders below; give the option once
            for each folder. Relative paths start at the first. If not given, the folder of the
            requests.
        allow_remote: fetch pictures from http and https addresses.
        retry_errors: ask those again whose result is an error.
        grace: seconds for what has begun when SIGTERM or SIGINT stops the job.
        report: a page of pictures, prompts and answers to write at the end; of several shards, give
            it with --merge.
        metrics: a JSONL file of speeds, a line every ten seconds.
        num_slots: requests that are answered at the same time.
        max_length: tokens of a request, prompt and answer together.
        max_tiles: tiles of all pictures of a request together. These three are chosen from the
            memory there is, if not given.
        dtype: of parameters and computation.
        attention: how attention is computed: "splash" has kernels for TPUs, "cudnn" for NVIDIA
            GPUs, "xla" runs anywhere, "reference" is slow and simple.
        quantise: store the decoder layers' weights in 8 or 4 bits: less memory, less exact.
        mesh: devices of this process to split model and requests over, such as tensor=4 or
            data=2,tensor=4; -1 stands for all that are left. One device if not given.
        shard: answer only every N-th line, from the I-th (0 to N - 1), into results.I-of-N.jsonl.
        distributed: this is one process of several, each on a host of its own and started with the
            same command. Each takes its part of the requests; the first one joins the results.
        merge: only join the results of all shards, in the order of the requests.
        compilation_cache: where compiled programs are kept for later starts; by default
            JAX_COMPILATION_CACHE_DIR or ~/.cache/mllama_jax/compiled.
        date: today's date as the chat template is to say it. A job that is carried on keeps it.
        revision: of a hub id.
    """
    options = BatchOptions(**locals())
    try:
        status = run_batch(options)
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        print(f"mllama-jax: {error}", file=sys.stderr)
        leave(NOT_RUN)
    except Exception:
        # Otherwise it would end like a job with errors among its results.
        traceback.print_exc()
        leave(NOT_RUN)
    if status:
        sys.exit(status)
