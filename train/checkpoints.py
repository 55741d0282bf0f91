"""What a stopped run goes on from: parameters, optimizer, step, key, and the place in the data."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from etils.epath import backend
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mllama_jax.cloud import is_cloud
from mllama_jax.train.config import CheckpointConfig
from mllama_jax.train.damage import is_damage, root, summary
from mllama_jax.train.digests import digests
from mllama_jax.train.origin import Origin, changed_since
from mllama_jax.train.step import Params, TrainState


class Checkpoints:
    """The checkpoints of one run, `folder`/<step>/. Opened by `open_checkpoints`.

    A checkpoint is written beside its final place and renamed when it is whole, so one that a
    crash cut short is never taken for a good one. One that was damaged later is found out by the
    digests that lie in it, and the one before it is used. None is taken for damaged that can't be
    read for another reason.
    """

    def __init__(
        self, checkpointer: ocp.training.Checkpointer, damaged: epath.Path, origin: Origin
    ):
        """Args: Orbax's; the folder that damaged checkpoints are moved to; the run's origin."""
        self._checkpointer = checkpointer
        self._damaged = damaged
        self._origin = origin
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
            numbers = {**digests(state), **asdict(self._origin)}
            parts = {"state": state, "data": data.get_state(), "digests": numbers}
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
                Returned as it is if there is no checkpoint; otherwise its arrays are deleted, as
                devices may have no room for two.
            data: an iterator over the same data set, made with the same settings.
            say: told of checkpoints that are damaged, which are moved away.

        Raises:
            ValueError: the checkpoint is of another model, other data or other frozen parameters;
                or there are damaged checkpoints and no good one.
            OSError: it can't be read now, for a reason that is not in its files.
        """
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        if steps:
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
            )
            jax.tree.map(lambda x: x.delete(), state)
        for step in sorted(steps, reverse=True):
            found = self._load(step, abstract)
            if isinstance(found, str):
                say(self._set_aside(step, found))
                continue
            data.set_state(found["data"])
            loaded: TrainState = found["state"]
            return loaded
        if self._damaged.exists() and any(self._damaged.iterdir()):
            raise ValueError(
                f"{self._checkpointer.directory}: there is no checkpoint that can be read, only "
                f"damaged ones, in {self._damaged}. Put a good copy of one into "
                f"{self._checkpointer.directory}; or remove {self._damaged}, and the run begins "
                "anew at step 0."
            )
        return state

    def _load(self, step: int, abstract: TrainState) -> dict[str, Any] | str:
        """A checkpoint's parts, or how it is damaged."""
        parts = {"state": abstract, "data": None, "digests": None}
        error: Exception | None = None
        found: dict[str, Any] = {}
        differing: list[str] = []
        try:
            differing = self._differing(step, abstract.params)
            if not differing:
                found = self._checkpointer.load_checkpointables(step, parts)
        except Exception as raised:  # whatever a library says of bytes that it did not expect
            error = raised
        where = self._checkpointer.directory / str(step)
        _check_readable(where, error)
        if differing:
            raise ValueError(
                f"{where} is a checkpoint of another model, or of a run that trains other parts of "
                "it; give this run another output. Parameters that differ:\n  "
                + "\n  ".join(differing)
            )
        problem = summary(root(error)) if error else self._changed(found)
        if not _is_so_everywhere(problem is None):
            return problem or "another process can't read it"
        if problem := changed_since(found["digests"], self._origin):
            raise ValueError(f"{where}: the run can't go on from there: {problem}")
        return found

    def _changed(self, found: dict[str, Any]) -> str | None:
        """What of the parts is not what was saved."""
        now, saved = digests(found["state"]), found["digests"]
        paths = {*now, *saved} - {*asdict(self._origin)}
        changed = [path for path in sorted(paths) if now.get(path) != saved.get(path)]
        if not changed:
            return None
        return f"its arrays are not those that were saved: {', '.join(changed[:3])}"

    def _differing(self, step: int, params: Params) -> list[str]:
        folder = self._checkpointer.directory / str(step)
        saved = ocp.metadata(folder, checkpointable_name="state").metadata
        if saved is None:  # it can't be read, and loading will say why
            return []
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
            _move(epath.Path(self._checkpointer.directory) / str(step), target)
        _wait_for_all("set aside")
        self._checkpointer.reload()
        return f"The checkpoint of step {step} is damaged ({problem}); it was moved to {target}."


def _move(folder: epath.Path, target: epath.Path) -> None:
    if is_cloud(folder):  # epath wants a folder to move to, which buckets do not have
        client = backend.fsspec_backend.fs(folder)
        client.mv(os.fspath(folder), os.fspath(target), recursive=True)
    else:
        folder.rename(target)


def _check_readable(where: epath.PathLike, error: Exception | None) -> None:
    """Raises OSError, in every process of a job, unless all of them could read or saw damage."""
    is_fine = error is None or is_damage(error)
    if not _is_so_everywhere(is_fine):
        why = "another process says why" if error is None or is_fine else summary(root(error))
        raise OSError(
            f"{where}: can't be read now, which does not show that it is damaged: {why}. Nothing "
            "was changed; start again when that is mended."
        ) from error


def _is_so_everywhere(here: bool) -> bool:
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).all())


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def open_checkpoints(
    folder: epath.PathLike, config: CheckpointConfig, origin: Origin
) -> Iterator[Checkpoints]:
    """Opens (or starts) a run's checkpoints, and waits at the end for what is being written.

    The newest `config.keep` of them stay on disk, and all of every `config.keep_every` steps.
    Damaged ones are moved to the folder damaged_checkpoints beside.
    """
    training, folder = ocp.training, epath.Path(folder)
    if not is_cloud(folder):  # of an address, epath would make a path below this folder
        folder = folder.absolute()
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
        yield Checkpoints(checkpointer, folder.parent / "damaged_checkpoints", origin)
