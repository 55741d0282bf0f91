"""What a run began with, so that it does not go on with something else unnoticed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Origin:
    """What a run's steps follow from, beside its state and its settings: numbers that differ if
    something else does."""

    num_records: int
    """Conversations that are trained on."""
    records: int
    """Of their text and order."""
    frozen: int
    """Of the parameters that are not trained."""


def changed_since(saved: Mapping[str, int], now: Origin) -> str | None:
    """What differs and what to do about it; None if nothing does.

    Args:
        saved: an origin's numbers by their names, beside others.
        now: that of the run that is to go on.
    """
    changed = {name for name, value in asdict(now).items() if saved.get(name, value) != value}
    problems = []
    if changed & {"num_records", "records"}:
        problems.append(
            f"its training data has changed ({saved['num_records']:,} conversations then, "
            f"{now.num_records:,} now), so their order would be another one, and some would be "
            "learned twice or never"
        )
    if "frozen" in changed:
        problems.append(
            "the parameters that are not trained have changed (the weights in model.path, or how "
            "model.param_dtype and model.quantise keep them)"
        )
    if not problems:
        return None
    return (
        f"{'; and '.join(problems)}. Put back what it began with; or give this run another output, "
        "to begin anew."
    )
