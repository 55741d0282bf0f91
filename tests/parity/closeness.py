"""How near to a reference a value must be."""

from typing import Any

import numpy as np

TOLERANCE = 1e-4
"""Of the reference's largest magnitude: the contract for float32."""


def to_numpy(value: Any) -> np.ndarray:
    """A torch tensor or a jax array as numpy."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


def assert_close(
    ours: Any, reference: Any, what: str = "", *, where: np.ndarray | None = None
) -> None:
    """Same shape, and the largest difference is within `TOLERANCE` of the reference's magnitude.

    ``where`` (B, T) limits the comparison to some tokens of arrays (B, T, ...).
    """
    ours, reference = to_numpy(ours), to_numpy(reference)
    assert ours.shape == reference.shape, f"{what}: {ours.shape} != {reference.shape}"
    if where is not None:
        ours, reference = ours[where], reference[where]
    assert np.isfinite(ours).all(), f"{what}: not finite"
    magnitude = np.abs(reference).max()
    difference = np.abs(ours - reference).max()
    assert difference <= TOLERANCE * magnitude, (
        f"{what}: differs by {difference:.3g}, the reference's largest magnitude is {magnitude:.3g}"
    )


def relative_difference(ours: Any, reference: Any) -> float:
    """The largest difference in units of the reference's largest magnitude."""
    ours, reference = to_numpy(ours), to_numpy(reference)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
