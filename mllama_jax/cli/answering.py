"""Answering a file of something with the batch engine, for the commands that do: what they share,
from the loading of the model to the exit status."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mllama_jax.cli.options import Attention, Dtype, Quantise, print_choices

if TYPE_CHECKING:
    from mllama_jax.batch.inputs import Shard, Source
    from mllama_jax.batch.job import Outcome
    from mllama_jax.batch.pictures import PictureSources
    from mllama_jax.batch.results_file import ResultsFile
    from mllama_jax.generation.config import GenerationConfig

SOME_FAILED, NOT_RUN = 1, 2
"""Exit statuses; beside these 0, and 128 and the number of the signal that stopped the job."""

_LONGEST_WAIT = 30 * 24 * 3600
"""Seconds that the processes of a job wait for the slowest."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Of a command that answers a file, by the same names."""

    model: str | None
    output_file: Path
    max_tokens: int | None
    temperature: float | None
    seed: int | None
    retry_errors: bool
    grace: float
    metrics: Path | None
    num_slots: int | None
    max_length: int | None
    max_tiles: int | None
    dtype: Dtype
    attention: Attention
    quantise: Quantise | None
    mesh: str | None
    distributed: bool
    compilation_cache: Path | None
    date: str | None
    revision: str | None


@dataclass(frozen=True)
class Work:
    """What is to be answered.

    Attributes:
        source: of the requests.
        pictures: where theirs may come from.
        identity: what else must be the same for results to belong together; JSON values.
        file: of the requests, if lines may be added to it later.
    """

    source: "Source"
    pictures: "PictureSources"
    identity: dict[str, Any]
    file: Path | None = None


def _prepare(options: JobOptions) -> None:
    if options.model is None:
        raise ValueError("give --model, the folder or hub id of a checkpoint")
    if not options.grace >= 0:
        raise ValueError(f"--grace {options.grace}: expected seconds, 0 or more")
    _keep_compiled(options.compilation_cache)


Finish = Callable[[Work, Path, bool], None]
"""Makes what is made of results at the end: of this work, in this file, complete or stopped."""


def run(options: JobOptions, shard: "Shard", make_work: Callable[[], Work], finish: Finish) -> int:
    """Answers all, or this process's part of it; returns the exit status.

    Args:
        options: of the command; of all processes of a distributed job, the same.
        shard: that is answered; the processes of a distributed job divide it further.
        make_work: called once JAX's processes know of each other.
        finish: in a distributed job only called by the first process, with the results of all.
    """
    _prepare(options)
    if options.distributed:
        return _share(options, shard, make_work, finish)
    work = make_work()
    outcome = _answer(options, work, shard)
    if not outcome.gave_up:
        finish(work, shard.path(options.output_file), outcome.stopped_by is None)
    return _exit_status(outcome)


def _share(
    options: JobOptions, shard: "Shard", make_work: Callable[[], Work], finish: Finish
) -> int:
    import jax

    from mllama_jax.distributed import join_processes

    join_processes()
    # JAX listens to it now, for training; here it is to end the process, as everywhere.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    part = shard.within(jax.process_index(), jax.process_count())
    work = make_work()
    outcome = _answer(options, work, part)
    if outcome.stopped_by is not None:
        # The others don't wait at the end for one that is stopped.
        leave(_exit_status(outcome))
    _wait_for_others("answered")
    status = _exit_status(outcome)
    if jax.process_index() == 0 and shard.count == 1:
        try:
            status = merge(work.source, options.output_file) if part.count > 1 else status
        except FileNotFoundError as error:
            say(f"{error}. Then join them with --merge.")
        else:
            finish(work, options.output_file, True)
    _wait_for_others("merged")
    return status


def merge(source: "Source", output: Path) -> int:
    """Joins the results of all parts of a job; returns the exit status."""
    from mllama_jax.batch.merge import merge_shards

    num_errors = merge_shards(source, output)
    print(f"{output}: the results of all, in the order of the requests", flush=True)
    return SOME_FAILED if num_errors else 0


def _answer(options: JobOptions, work: Work, shard: "Shard") -> "Outcome":
    """Opens the results, then the model, and answers what has no result yet."""
    from mllama_jax.batch.identity import check_requests, requests_identity
    from mllama_jax.batch.inputs import items
    from mllama_jax.batch.job import Outcome, run_job
    from mllama_jax.batch.results_file import ResultsFile

    started = time.monotonic()
    assert options.model is not None
    path = shard.path(options.output_file)
    fingerprint = _fingerprint(options, work)
    with ResultsFile(path, fingerprint, retry_errors=options.retry_errors) as results:
        _check_kept(options, results)
        if work.file is not None:
            if not options.retry_errors:
                check_requests(path, results.kept.get("requests"), work.file)
            results.keep(requests=requests_identity(work.file))
        if results.num_lines:
            say(f"{path} has {results.num_lines:,} results; carrying on")
        if next(items(work.source, shard, results.done), None) is None:
            count = results.num_lines
            outcome = Outcome(
                count, count, results.num_errors, None, False, "Every request has a result."
            )
        else:
            engine, processor = _load(options, results, work.pictures)
            say(f"Ready after {time.monotonic() - started:.1f} s")
            outcome = run_job(
                engine,
                work.source,
                results,
                tokenizer=processor.tokenizer,
                model_name=options.model,
                shard=shard,
                grace=options.grace,
                metrics=None if options.metrics is None else shard.path(options.metrics),
                show=_is_first(options),
            )
    print(outcome.summary, flush=True)
    return outcome


def _check_kept(options: JobOptions, results: "ResultsFile") -> None:
    """Raises ValueError if what would change answers was something else for those that are there.
    Longer answers and more pictures are what errors may be asked again with."""
    for name in ("date", "max_length", "max_tiles"):
        given, kept = getattr(options, name), results.kept.get(name)
        if given is None or kept in (None, given) or (name != "date" and options.retry_errors):
            continue
        option = f"--{name.replace('_', '-')}"
        errors = "" if name == "date" else " (or ask errors again with it: --retry-errors)"
        raise ValueError(
            f"{results.path} was begun with {option} {kept}, and is now to go on with {given}; "
            f"leave out {option}{errors}, or give another output"
        )


def _load(
    options: JobOptions, results: "ResultsFile", sources: "PictureSources"
) -> tuple[Any, Any]:
    """The engine, warmed up, and the processor."""
    import jax

    import mllama_jax as mj
    from mllama_jax.batch.engine import Engine
    from mllama_jax.batch.sizes import choose_options, describe
    from mllama_jax.sharding import parse_mesh

    assert options.model is not None
    processor = mj.MllamaProcessor.from_pretrained(options.model, revision=options.revision)
    date = options.date or results.kept.get("date") or _today(processor)
    # Each process has a model of its own, on its own devices.
    mesh = None if options.mesh is None else parse_mesh(options.mesh, jax.local_devices())
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(
        options.model,
        dtype=options.dtype,
        attention=options.attention,
        quantise=options.quantise,
        mesh=mesh,
        revision=options.revision,
    )
    print_choices(model)
    # The room for an answer that has no limit is part of what it will be.
    given = {"max_length": options.max_length, "max_tiles": options.max_tiles}
    room = {name: results.kept.get(name) if n is None else n for name, n in given.items()}
    sizes = choose_options(model, num_slots=options.num_slots, **room)
    results.keep(date=date, max_length=sizes.max_length, max_tiles=sizes.max_tiles)
    say(describe(model, sizes))
    engine = Engine(model, params, processor, options=sizes, sources=sources, date_string=date)
    if jax.default_backend() != "cpu":  # there it is quick, and most jobs need few of the programs
        say("Compiling")
        engine.warm_up()
    return engine, processor


def _today(processor: Any) -> str | None:
    """The date as the chat template would write it; None if it asks for none."""
    asked = re.search(r"strftime_now\(\s*([\"'])(.*?)\1", str(processor.chat_template))
    return time.strftime(asked[2]) if asked else None


def _fingerprint(options: JobOptions, work: Work) -> dict[str, Any]:
    """What must be the same for results to belong together."""
    import mllama_jax as mj
    from mllama_jax.batch.identity import processor_identity, weights_identity
    from mllama_jax.convert import open_source

    checkpoint = open_source(str(options.model), revision=options.revision)
    described = [checkpoint.config.to_dict(), _generation_config(checkpoint).to_dict()]
    text = json.dumps(described, sort_keys=True, default=str)
    return {
        "mllama_jax": mj.__version__,
        **work.identity,
        "model": options.model,
        "revision": checkpoint.revision,
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "processor": processor_identity(checkpoint),
        "weights": weights_identity(checkpoint),
        "pictures": str(next(iter(work.pictures.allowed_folders), None)),
        "dtype": options.dtype,
        "attention": options.attention,
        "quantise": options.quantise,
        "defaults": dataclasses.asdict(defaults(options)),
    }


def defaults(options: JobOptions) -> Any:
    """How answers are chosen where a request says nothing."""
    from mllama_jax.batch.requests import default_options
    from mllama_jax.convert import open_source

    assert options.model is not None
    generation = _generation_config(open_source(options.model, revision=options.revision))
    given: dict[str, Any] = {
        "default_max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ValueError(f"--max-tokens {options.max_tokens}: expected at least 1")
    if options.temperature is not None and not options.temperature >= 0:
        raise ValueError(f"--temperature {options.temperature}: expected 0 or more")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed {options.seed}: expected 32 bits, 0 to {2**32 - 1}")
    said = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(default_options(generation), **said)


def _generation_config(checkpoint: Any) -> "GenerationConfig":
    from mllama_jax.generation.config import FILE_NAME, GenerationConfig

    for file in checkpoint.carried:
        if file.name == FILE_NAME:
            return GenerationConfig.from_pretrained(file.parent)
    text = getattr(checkpoint.config, "text_config", checkpoint.config)
    return GenerationConfig.from_model_config(text)


def _exit_status(outcome: "Outcome") -> int:
    """Of a process whose part ended so; leaves at once if its threads can't be waited for."""
    if outcome.stopped_by is not None:
        status = 128 + signal.Signals[outcome.stopped_by]
        if outcome.gave_up:
            # Threads that prepare pictures may be at it for long.
            leave(status)
        return status
    return SOME_FAILED if outcome.errors else 0


def leave(status: int) -> NoReturn:
    """Ends this process without waiting for threads, or for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait_for_others(where: str) -> None:
    """Raises OSError if one of them has ended."""
    import jax
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    # In the wait no handler of Python's would be called.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        get_barrier_sync_fn()(key=f"mllama_jax {where}", timeout_ms=_LONGEST_WAIT * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise OSError(
            "another process of this job has ended before its part was done; the results that are "
            f"there stay, and the same command carries on ({str(error).splitlines()[0]})"
        ) from error


def _keep_compiled(folder: Path | None) -> None:
    """Compiled programs outlive the process."""
    import jax

    home = os.environ.get("XDG_CACHE_HOME")
    default = (Path(home) if home else Path.home() / ".cache") / "mllama_jax" / "compiled"
    chosen = str(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or default)
    jax.config.update("jax_compilation_cache_dir", chosen)
    # Small programs are many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    say(f"Compiled programs are kept in {chosen}")


def _is_first(options: JobOptions) -> bool:
    if not options.distributed:
        return True
    import jax

    return jax.process_index() == 0


def say(text: str) -> None:
    """Tells the person who waits, on standard error."""
    print(text, file=sys.stderr, flush=True)
