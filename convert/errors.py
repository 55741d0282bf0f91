"""The error of checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read as what it is meant to be; all reasons in one message."""
