"""Which errors of reading a checkpoint show that its files are damaged, and which do not."""

import re

_STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
_OF_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION")
"""What TensorStore calls contents and files that are not what they should be. A message without
any status is of an invalid argument: what it read makes no sense."""


def is_damage(error: BaseException) -> bool:
    """Whether a file is missing or its contents make no sense.

    All else (network, permissions, memory, disks, bugs) says nothing about the checkpoint, and
    may be over at the next attempt.
    """
    cause = root(error)
    if isinstance(cause, ValueError):  # of JSON, too
        status = _STATUS.match(str(cause))
        return status is None or status[1] in _OF_DAMAGE
    # Descriptions in JSON that lack something, or have something else in its place.
    return isinstance(cause, FileNotFoundError | LookupError | TypeError | AttributeError)


def root(error: BaseException) -> BaseException:
    """What first went wrong: Orbax calls every failure one of a missing entry."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def summary(error: BaseException) -> str:
    """An error's type and first line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"
