"""What a stopped run goes on from: parameters, optimizer, step, key, and the place in the data."""

from collections.abc import Iterator
from contextlib import contextmanager

import grain
import jax
from etils import epath
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from mllama_jax.train.config import CheckpointConfig
from mllama_jax.train.step import Params, TrainState


class Checkpoints:
    """The checkpoints of one run, `folder`/<step>/. Opened by `open_checkpoints`.

    A checkpoint is written beside its final place and renamed when it is whole, so one that a
    crash cut short is never taken for a good one.
    """

    def __init__(self, checkpointer: ocp.training.Checkpointer):
        self._checkpointer = checkpointer

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Writes a checkpoint of `state.step`, unless there is one; waits until it is whole."""
        step = int(state.step)
        if step != self.latest_step:
            # The same in every process, and so of use to a job of any number of them.
            place = data.get_state()
            self._checkpointer.save_checkpointables(step, {"state": state, "data": place})

    def restore(self, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint's state; `data` is moved to where it stood then.

        Args:
            state: of the same shapes and dtypes, on any mesh; only these and where it lies count.
            data: an iterator over the same data set, made with the same settings.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        self._check(state.params)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        found = self._checkpointer.load_checkpointables(
            self.latest_step, {"state": abstract, "data": None}
        )
        data.set_state(found["data"])
        return found["state"]

    def _check(self, params: Params) -> None:
        folder = self._checkpointer.directory / str(self.latest_step)
        saved = ocp.metadata(folder, checkpointable_name="state").metadata
        found, expected = (
            {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
            for tree in (saved["params"], params)
        )
        differing = [
            f"{path}: {found.get(path, 'absent')}, expected {expected.get(path, 'none')}"
            for path in sorted({*found, *expected})
            if found.get(path) != expected.get(path)
        ]
        if differing:
            raise ValueError(
                f"{folder} is a checkpoint of another model; give this run another output. "
                "Parameters that differ:\n  " + "\n  ".join(differing)
            )


@contextmanager
def open_checkpoints(folder: epath.PathLike, config: CheckpointConfig) -> Iterator[Checkpoints]:
    """Opens (or starts) a run's checkpoints; the newest `config.keep` of them stay on disk."""
    training = ocp.training
    with training.Checkpointer(
        epath.Path(folder).absolute(),
        save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=training.preservation_policies.LatestN(config.keep),
        cleanup_tmp_directories=True,
    ) as checkpointer:
        yield Checkpoints(checkpointer)
