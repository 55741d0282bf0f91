"""Moving blocks from a source to a target: reading, transforming and writing overlap."""

import errno
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
from etils import epath

from mllama_jax.convert.blocks import copy_cast
from mllama_jax.convert.lazy import Region, extent
from mllama_jax.convert.targets.folders import is_placing, remove_unfinished, unmark
from mllama_jax.convert.targets.target import Output, Target

_FLUSH_BYTES = 2**31
_FLUSH_SECONDS = 20.0


def run(
    target: Target,
    *,
    done: Collection[str],
    workers: int,
    on_bytes: Callable[[int], None],
    on_flushed: Callable[[list[Output]], None],
) -> None:
    """Writes all of a target's outputs but those that are done.

    At any time each worker holds one block, and a few finished ones may wait for their turn.

    Args:
        done: names of outputs to leave out.
        workers: threads.
        on_bytes: told of every block when it is written: its bytes. Called from all threads.
        on_flushed: told of outputs that are whole and would survive a crash of the machine.

    Raises:
        OSError: a full disk, with what to do; other errors of reading and writing.
        CheckpointError: values that the result's dtype can't hold.
    """
    run_blocks = _ordered if target.ordered else _unordered
    finished = _Finished(target, on_flushed)
    try:
        for output, size in run_blocks(target, done, workers):
            on_bytes(size)
            finished.count(output)
        finished.wait()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                "no space left for the result; free some and run the same command again: what is "
                "finished is not done again",
            ) from error
        raise
    finally:
        finished.close()
        target.close()


def write_at_once(target: Target, folder: epath.Path, files: Mapping[str, bytes]) -> None:
    """Writes all of a result in one go: if that fails, nothing is left to go on from.

    Args:
        folder: the target's.
        files: what goes with the weights.
    """
    target.start(done=())
    try:
        run(target, done=(), workers=1, on_bytes=lambda _: None, on_flushed=lambda _: None)
        target.finish(files)
    except BaseException:
        if not is_placing(folder):
            remove_unfinished(folder)
        raise
    unmark(folder)


class _Finished:
    """Counts blocks, and reports outputs of which all are written once they are flushed.

    Flushing waits for the disk, so it has a thread of its own.
    """

    def __init__(self, target: Target, on_flushed: Callable[[list[Output]], None]):
        self._target = target
        self._on_flushed = on_flushed
        self._left: dict[str, int] = {}
        self._whole: list[Output] = []
        self._thread = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._flushed_at = time.monotonic()

    def count(self, output: Output) -> None:
        left = self._left[output.name] = self._left.get(output.name, len(output.blocks)) - 1
        if left == 0:
            self._whole.append(output)
        idle = self._flushing is None or self._flushing.done()
        if idle and (
            sum(output.num_bytes for output in self._whole) >= _FLUSH_BYTES
            or time.monotonic() - self._flushed_at > _FLUSH_SECONDS
        ):
            self._begin()

    def wait(self) -> None:
        """Returns when everything counted is flushed and reported."""
        if self._flushing is not None:
            self._flushing.result()
        self._begin().result()

    def close(self) -> None:
        self._thread.shutdown()

    def _begin(self) -> Future[None]:
        if self._flushing is not None:
            self._flushing.result()  # raises what went wrong there
        whole, self._whole = self._whole, []
        self._flushing = self._thread.submit(self._flush, whole)
        self._flushed_at = time.monotonic()
        return self._flushing

    def _flush(self, whole: list[Output]) -> None:
        self._target.flush()
        self._on_flushed(whole)


def _blocks(target: Target, done: Collection[str]) -> Iterator[tuple[Output, Region]]:
    for output in target.outputs:
        if output.name not in done:
            for region in output.blocks:
                yield output, region


def prepare(output: Output, region: Region) -> np.ndarray:
    """The values of one block as they are written: C-contiguous, of the output's dtype."""
    values = output.values.read(region)
    if values.dtype != output.values.dtype or values.shape != extent(region):
        raise ValueError(
            f"{output.name}: found {values.dtype}{list(values.shape)}, "
            f"expected {output.values.dtype}{list(extent(region))}"
        )
    if values.dtype == output.dtype and values.flags.c_contiguous:
        return values
    block = np.empty(values.shape, output.dtype)
    copy_cast(block, values, output.source)
    return block


def _ordered(target: Target, done: Collection[str], workers: int) -> Iterator[tuple[Output, int]]:
    """Blocks are made by workers ahead of this thread, which writes them in their order."""
    blocks = _blocks(target, done)
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[tuple[Output, Region, Future[np.ndarray]]] = []

        def submit() -> None:
            for output, region in blocks:
                waiting.append((output, region, pool.submit(prepare, output, region)))
                return

        try:
            for _ in range(workers + 2):
                submit()
            while waiting:
                output, region, future = waiting.pop(0)
                values = future.result()
                submit()
                target.write(output, region, values)
                yield output, values.nbytes
        finally:
            for *_, future in waiting:
                future.cancel()


def _unordered(target: Target, done: Collection[str], workers: int) -> Iterator[tuple[Output, int]]:
    """Every worker makes a block and writes it."""
    stop = threading.Event()

    def move(output: Output, region: Region) -> tuple[Output, int]:
        if stop.is_set():
            return output, 0
        values = prepare(output, region)
        target.write(output, region, values)
        return output, values.nbytes

    with ThreadPoolExecutor(workers) as pool:
        waiting: set[Future[tuple[Output, int]]] = set()
        try:
            for output, region in _blocks(target, done):
                if len(waiting) > workers:
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
                waiting.add(pool.submit(move, output, region))
            for future in waiting:
                yield future.result()
        finally:
            stop.set()
