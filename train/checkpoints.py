"""What a stopped run goes on from: parameters, optimizer, step, key, and the place in the data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mllama_jax.train.config import CheckpointConfig
from mllama_jax.train.digests import digests
from mllama_jax.train.step import Params, TrainState


class Checkpoints:
    """The checkpoints of one run, `folder`/<step>/. Opened by `open_checkpoints`.

    A checkpoint is written beside its final place and renamed when it is whole, so one that a
    crash cut short is never taken for a good one. One that was damaged later is found out by the
    digests that lie in it, and the one before it is used.
    """

    def __init__(self, checkpointer: ocp.training.Checkpointer, damaged: epath.Path):
        """Args: Orbax's; the folder that damaged checkpoints are moved to."""
        self._checkpointer = checkpointer
        self._damaged = damaged
        self._saved: int | None = None

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Begins to write a checkpoint of `state.step`, unless there is one.

        Returns when the arrays are copied and may be given away; the writing goes on beside the
        next steps. Waits for the checkpoint before it.
        """
        step = int(state.step)
        self.wait()
        if step not in (self.latest_step, self._saved):
            self._saved = step
            # The place in the data is the same in every process, and so of use to any number.
            parts = {"state": state, "data": data.get_state(), "digests": digests(state)}
            self._checkpointer.save_checkpointables_async(step, parts)

    def wait(self) -> None:
        """Returns when the newest checkpoint is whole, on disk."""
        self._checkpointer.wait()

    def restore(
        self, state: TrainState, data: grain.DatasetIterator, say: Callable[[str], None]
    ) -> TrainState:
        """The newest undamaged checkpoint's state; `data` is moved to where it stood then.

        Args:
            state: of the same shapes and dtypes, on any mesh; only these and where it lies count.
                Returned as it is if there is no checkpoint.
            data: an iterator over the same data set, made with the same settings.
            say: told of checkpoints that are damaged, which are moved away.

        Raises:
            ValueError: the checkpoint is of another model; or all of them are damaged.
        """
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        for step in sorted(steps, reverse=True):
            found, problem = self._load(step, state)
            if _is_good_everywhere(problem):
                data.set_state(found["data"])
                loaded: TrainState = found["state"]
                return loaded
            say(self._set_aside(step, problem or "another process can't read it"))
        if steps:
            raise ValueError(
                f"{self._checkpointer.directory}: no checkpoint can be read, so all were moved to "
                f"{self._damaged}. Started again, the run begins at step 0."
            )
        return state

    def _load(self, step: int, state: TrainState) -> tuple[dict[str, Any], str | None]:
        """A checkpoint's parts, and what is wrong with them."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        parts = {"state": abstract, "data": None, "digests": None}
        try:
            differing = self._differing(step, state.params)
            found = None if differing else self._checkpointer.load_checkpointables(step, parts)
        except Exception as error:  # whatever a library says of bytes that it did not expect
            return {}, f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        if found is None:
            raise ValueError(
                f"{self._checkpointer.directory / str(step)} is a checkpoint of another model, or "
                "of a run that trains other parts of it; give this run another output. Parameters "
                "that differ:\n  " + "\n  ".join(differing)
            )
        now, saved = digests(found["state"]), found["digests"]
        changed = [path for path in sorted({*now, *saved}) if now.get(path) != saved.get(path)]
        problem = f"its arrays are not those that were saved: {', '.join(changed[:3])}"
        return found, problem if changed else None

    def _differing(self, step: int, params: Params) -> list[str]:
        folder = self._checkpointer.directory / str(step)
        saved = ocp.metadata(folder, checkpointable_name="state").metadata
        found, expected = (
            {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
            for tree in (saved["params"], params)
        )
        return [
            f"{path}: {found.get(path, 'absent')}, expected {expected.get(path, 'none')}"
            for path in sorted({*found, *expected})
            if found.get(path) != expected.get(path)
        ]

    def _set_aside(self, step: int, problem: str) -> str:
        """Moves a checkpoint away; returns what to say about it."""
        target = self._damaged / str(step)
        if jax.process_index() == 0:
            self._damaged.mkdir(parents=True, exist_ok=True)
            while target.exists():
                target = target.with_name(f"{target.name}-again")
            (epath.Path(self._checkpointer.directory) / str(step)).rename(target)
        _wait_for_all("set aside")
        self._checkpointer.reload()
        return f"The checkpoint of step {step} is damaged ({problem}); it was moved to {target}."


def _is_good_everywhere(problem: str | None) -> bool:
    if jax.process_count() == 1:
        return problem is None
    return bool(multihost_utils.process_allgather(np.array(problem is None)).all())


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def open_checkpoints(folder: epath.PathLike, config: CheckpointConfig) -> Iterator[Checkpoints]:
    """Opens (or starts) a run's checkpoints, and waits at the end for what is being written.

    The newest `config.keep` of them stay on disk, and all of every `config.keep_every` steps.
    Damaged ones are moved to the folder damaged_checkpoints beside.
    """
    training, folder = ocp.training, epath.Path(folder).absolute()
    policies = training.preservation_policies
    kept: Any = policies.LatestN(config.keep)
    if config.keep_every is not None:
        kept = policies.AnyPreservationPolicy([kept, policies.EveryNSteps(config.keep_every)])
    with training.Checkpointer(
        folder,
        save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=kept,
        cleanup_tmp_directories=True,
    ) as checkpointer:
        yield Checkpoints(checkpointer, folder.parent / "damaged_checkpoints")
