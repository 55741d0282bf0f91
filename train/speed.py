"""How fast a run is: tokens and pictures a second, waiting, utilisation of the device, memory."""

import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from mllama_jax.plan.hardware import DEVICE_KINDS, GIB, chip_of
from mllama_jax.shapes import Array
from mllama_jax.sharding import device_kind
from mllama_jax.train.data.batches import HostBatch
from mllama_jax.train.flops import counts, step_flops
from mllama_jax.train.job import Job
from mllama_jax.train.metrics import Numbers

COMPILING = "/jax/core/compile/backend_compile_duration"


class Speed:
    """Adds up the work of some steps and the time that it took.

    The clock runs from the moment that the first of them waits for its batch, so saving and
    evaluating between two intervals does not count. Waiting is what the device has nothing to do
    for: from the moment that it has done the step before, and the next batch was asked for, until
    that batch is there. Use as a context manager around all steps.
    """

    def __init__(self, job: Job):
        self._config = job.model.full_config
        self._formula = step_flops(job.model, job.config.recipe)
        # Rows of other processes are not here; they stand for equally much work.
        self._share = job.config.data.batch_size / len(job.rows)
        mesh = job.model.mesh
        self._num_devices = 1 if mesh is None else mesh.size
        self._kind = device_kind(mesh)
        chip = chip_of(self._kind)
        self._peak = None if chip is None else chip.peak_flops
        # One thread, which sleeps until the device has done a step: the run itself waits for none.
        self._watcher = ThreadPoolExecutor(max_workers=1)
        self._done: Future[float] | None = None
        self._clear()

    def _clear(self) -> None:
        self._began: float | None = None
        self._steps = self._tokens = self._images = 0
        self._waited = self._flops = self._compiling = 0.0

    def about_peak(self) -> str | None:
        """Why there is no utilisation, if there is none."""
        if self._peak is not None:
            return None
        return (
            f"No peak is known of {self._kind!r}, so TFLOP/s are shown and no MFU; known are "
            f"{', '.join(DEVICE_KINDS)}."
        )

    def timed(self, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        """The same batches; what the run waits for them is measured, and what is in them."""
        while True:
            asked = time.monotonic()
            self._began = asked if self._began is None else self._began
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += self._starved(asked, time.monotonic())
            self._steps += 1
            self._tokens += batch.num_tokens
            self._images += batch.num_images
            self._flops += self._share * self._formula.of(counts(batch.arrays, self._config))
            yield batch

    def dispatched(self, result: Array) -> None:
        """Is told of a step that the device is to do, by a number that it makes."""
        self._done = self._watcher.submit(_when_done, result)

    def _starved(self, asked: float, came: float) -> float:
        """Seconds between the two times in which the device had nothing to do."""
        if self._done is None:
            return came - asked
        if not self._done.done():
            return 0.0
        return max(0.0, came - max(asked, self._done.result()))

    def measured(self) -> Numbers:
        """Of the steps since the last call, which the device has done."""
        assert self._began is not None
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._flops / seconds / self._num_devices
        numbers = {
            "steps": self._steps,
            "seconds": seconds,
            "step_seconds": seconds / self._steps,
            "wait_seconds": self._waited,
            "wait_share": self._waited / seconds,
            "compile_seconds": self._compiling,
            "tokens_per_second": self._tokens / seconds,
            "images_per_second": self._images / seconds,
            "tflops_per_device": rate / 1e12,
        }
        if self._peak is not None:
            numbers["mfu"] = rate / self._peak
        self._clear()
        return {**numbers, **memory()}

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILING and self._began is not None:
            self._compiling += duration_secs

    def __enter__(self) -> "Speed":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self._watcher.shutdown(wait=False)


def _when_done(result: Array) -> float:
    result.block_until_ready()
    return time.monotonic()


def memory() -> dict[str, float]:
    """In GiB: of this process's fullest device now and at most; of the host where a device does
    not say, at most."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if found:
        used, peak = (
            max(stats.get(name, 0) for stats in found)
            for name in ("bytes_in_use", "peak_bytes_in_use")
        )
        return {"device_gib": used / GIB, "device_peak_gib": peak / GIB}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host_peak_gib": peak / GIB}


def described(numbers: Numbers) -> str:
    """For the progress line."""
    said = [
        f"{numbers['tokens_per_second']:.0f} tokens/s",
        f"{numbers['images_per_second']:.1f} images/s",
        f"{numbers['step_seconds']:.3f} s/step",
        f"wait {numbers['wait_share']:.0%}",
    ]
    if "mfu" in numbers:
        said.append(f"MFU {numbers['mfu']:.1%}")
    else:
        said.append(f"{numbers['tflops_per_device']:.3g} TFLOP/s")
    if "device_gib" in numbers:
        said.append(f"{numbers['device_gib']:.1f}/{numbers['device_peak_gib']:.1f} GiB")
    else:
        said.append(f"host {numbers['host_peak_gib']:.1f} GiB")
    if numbers["compile_seconds"] > 0.1:
        said.append(f"compiling {numbers['compile_seconds']:.1f} s")
    return "  ".join(said)
