"""Which record comes when: an endless order that follows from the seed alone."""

from collections.abc import Sequence

import grain
import numpy as np


def make_order(
    lengths: Sequence[int], weights: Sequence[float | None], seed: int
) -> grain.MapDataset[int]:
    """Record numbers in the order in which examples come, of any length, read at any place.

    Without weights every record comes once in each epoch, and every epoch has its own order. With
    weights, each source goes through epochs of its own, and the sources take turns, evenly.

    Args:
        lengths: records of each source; they are numbered through.
        weights: shares of the examples that come from each source, of any sum; None for all of
            them, or for none.
        seed: below 2**32.
    """
    stops = np.cumsum(lengths).tolist()
    # Grain's own seed for an epoch is the sum of both: neighbours would share epochs.
    seeds = np.random.SeedSequence(seed).generate_state(len(lengths)).tolist()
    given = [weight for weight in weights if weight is not None]
    if not given:
        return grain.MapDataset.range(stops[-1]).shuffle(seed=seeds[0]).repeat()
    parts = [
        grain.MapDataset.range(stop - length, stop).shuffle(seed=part_seed).repeat()
        for length, stop, part_seed in zip(lengths, stops, seeds, strict=True)
    ]
    return grain.MapDataset.mix(parts, given)
