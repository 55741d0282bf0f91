"""From a checkpoint of one format to a folder of another: planned first, then streamed."""

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from mllama_jax.convert import companions
from mllama_jax.convert.hashing import SourceHashes
from mllama_jax.convert.journal import Journal
from mllama_jax.convert.pipeline import run
from mllama_jax.convert.plan import Format, Plan, plan_conversion
from mllama_jax.convert.progress import size
from mllama_jax.convert.targets.folders import is_placing, place, unmark
from mllama_jax.convert.targets.target import Output


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        folder: where the result is.
        to: its format.
        num_tensors: tensors in it.
        num_bytes: of these tensors.
        resumed_bytes: of tensors that an earlier process had finished.
        seconds: of this process.
        notes: what a user should know.
    """

    folder: Path
    to: Format
    num_tensors: int
    num_bytes: int
    resumed_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Report:
    """Converts a checkpoint; see `plan_conversion` for the arguments and `Plan` for what is done.

    Tensors are read, transformed and written in blocks of about 16 MiB, so memory does not grow
    with the model. Killed at any moment, `dst` holds what it held before, or nothing that loads;
    the same call then goes on and keeps the tensors that were finished. When everything is done,
    the same call does nothing.

    Args:
        workers: threads; None is one for each processor, at least 2 and at most 8.
        progress: told of the bytes that an earlier process wrote (0 if there is none), then of
            every block's as it is written.
        **options: as `plan_conversion` takes them.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `plan_conversion`.
        FileExistsError: `dst` holds something, and `overwrite` was not given.
        OSError: too little disk for the result (before anything is written), or a full disk.
    """
    return run_plan(plan_conversion(src, dst, **options), workers=workers, progress=progress)


def run_plan(
    plan: Plan, *, workers: int | None = None, progress: Callable[[int], None] | None = None
) -> Report:
    """Does what was planned, or what an earlier process left of it; see `convert`."""
    started = time.monotonic()
    workers = min(8, max(2, os.cpu_count() or 2)) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    progress = progress or (lambda _: None)
    journal = Journal(plan.folder)
    state = _earlier_state(plan, journal)
    _check_disk(plan, state.done)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _locked(plan.folder):
        # Another process may have finished, or gone on, before this one had the lock.
        state = _earlier_state(plan, journal)
        progress(sum(o.num_bytes for o in plan.outputs if o.name in state.done))
        if state.resumed and is_placing(epath.Path(plan.folder)):
            place(epath.Path(plan.folder))
        elif not state.complete:
            _stream(plan, journal, state, workers, progress)
        journal.remove()
        unmark(epath.Path(plan.folder))
    return Report(
        folder=plan.folder,
        to=plan.to,
        num_tensors=len(plan.outputs),
        num_bytes=plan.total_bytes,
        resumed_bytes=sum(o.num_bytes for o in plan.outputs if o.name in state.done),
        seconds=time.monotonic() - started,
        notes=plan.source.notes,
    )


@dataclass
class _State:
    """What an earlier process did of the same plan.

    Attributes:
        done: names of outputs that it wrote.
        hashes: of source files, by name.
        resumed: its journal is there.
        complete: it did everything.
    """

    done: set[str] = field(default_factory=set)
    hashes: dict[str, str] = field(default_factory=dict)
    resumed: bool = False
    complete: bool = False


def _earlier_state(plan: Plan, journal: Journal) -> _State:
    """Raises FileExistsError if the folder holds what this plan may not replace."""
    found, entries = journal.read()
    if found is not None and found == plan.fingerprint:
        state = _State(resumed=True)
        for entry in entries:
            state.done.update(entry.get("done", ()))
            state.hashes.update(entry.get("sha256", {}))
        return state
    if found is None and not plan.overwrite and _made_by(plan):
        return _State(done={output.name for output in plan.outputs}, complete=True)
    if plan.overwrite or not plan.folder.exists() or journal.is_alone():
        return _State()
    if found is None:
        raise FileExistsError(
            f"{plan.folder} exists and is not empty; give another folder, or --overwrite "
            "(overwrite=True) to replace the checkpoint in it"
        )
    raise FileExistsError(
        f"{plan.folder} holds an unfinished conversion of {found['source']['path']} with "
        f"{found['options']}, and this is not the same one (or its source has changed): repeat "
        "that command, give another folder, or --overwrite (overwrite=True) to begin anew"
    )


def _made_by(plan: Plan) -> bool:
    """Whether the folder holds the whole result of this plan."""
    file = plan.folder / companions.PROVENANCE
    try:
        return json.loads(file.read_text())["plan"] == plan.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stream(
    plan: Plan,
    journal: Journal,
    state: _State,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Writes what is not written yet, and puts everything in its place."""
    if not state.resumed:
        # What an earlier conversion left of its last step would be taken for this one's.
        unmark(epath.Path(plan.folder))
        journal.begin(plan.fingerprint)
    plan.target.start(state.done)

    def on_hashed(name: str, digest: str) -> None:
        journal.add([{"sha256": {name: digest}}])

    def on_flushed(outputs: Sequence[Output]) -> None:
        journal.add([{"done": [output.name for output in outputs]}])

    with SourceHashes(plan.source, state.hashes, on_hashed) as source_hashes:
        run(
            plan.target,
            done=state.done,
            workers=workers,
            on_bytes=progress,
            on_flushed=on_flushed,
        )
        hashes = source_hashes.result()
    plan.target.finish(_companions(plan, hashes))


def _companions(plan: Plan, source_hashes: Mapping[str, str]) -> dict[str, bytes]:
    """The files that go with the weights, by name."""
    leaves = [(output.dtype, math.prod(output.shape)) for output in plan.outputs]
    made_how = companions.provenance(plan.source, source_hashes, plan.target.sha256(), plan.options)
    made_how["plan"] = plan.fingerprint
    files = {companions.PROVENANCE: companions.json_bytes(made_how)}
    if plan.to == "meta":
        return files | companions.carried_to_meta(plan.source)
    config = companions.config_json(plan.config, plan.component, leaves)
    return {
        **companions.carried(plan.source, plan.component, plan.processor),
        **files,
        "config.json": companions.json_bytes(config),
    }


def _check_disk(plan: Plan, done: set[str]) -> None:
    parent = plan.folder
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    needed = sum(o.num_bytes for o in plan.outputs if o.name not in done)
    # The file system needs some for itself, and there are files besides the tensors.
    needed += plan.total_bytes // 100 + 2**20
    if needed > free:
        raise OSError(
            f"{plan.folder}: the result takes {size(needed)} more, but {size(free)} are free; "
            "nothing was written"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes of this machine from converting into the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"{folder}: another process is converting into it") from error
        yield
    finally:
        os.close(handle)
