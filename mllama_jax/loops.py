"""Loops whose length the values decide, with a bound that a reader of the program finds."""

import re
from contextlib import AbstractContextManager
from typing import Any

import jax

_NAME = "at_most_{}_runs"
_LOOP = re.compile(_NAME.format(r"(\d+)") + r"/while$")


def at_most(runs: int) -> AbstractContextManager[Any]:
    """A scope for one `jax.lax.while_loop` or `jax.lax.fori_loop` that runs no more often."""
    scope: AbstractContextManager[Any] = jax.named_scope(_NAME.format(runs))
    return scope


def most_runs(op_name: str) -> int | None:
    """The bound of a compiled loop, from the path that it was traced in; None if it has none."""
    found = _LOOP.search(op_name)
    return None if found is None else int(found[1])
