"""Which examples stand together in a batch, known to every process without asking the others."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from threading import Lock

import numpy as np

from mllama_jax.train.data.examples import Example, ExampleMaker
from mllama_jax.train.data.order import make_order
from mllama_jax.train.data.packing import Row, pack
from mllama_jax.train.data.records import BadRecord, DataError
from mllama_jax.train.data.settings import DataConfig
from mllama_jax.train.data.sources import Sources

WINDOW_BATCHES = 16
"""Batches whose examples are sorted, or packed, together."""
MOST_IMAGE_SHAPES = 8
"""Numbers of picture slots, beside none, that packed batches may have: each is a program."""
FEWEST_COUNTED = 512
"""Examples that say how many fit into a row."""


@dataclass(frozen=True)
class PlannedBatch:
    """The examples of all rows of a batch, and the shape of its arrays."""

    rows: Sequence[Row]
    """Each with one example, or packed with any number of them."""
    length: int
    """Tokens that rows are padded to."""
    num_images: int
    """Slots for pictures that a row has."""
    is_packed: bool = False

    @property
    def examples(self) -> list[Example]:
        return list(chain.from_iterable(self.rows))


class BatchPlan:
    """The batches of a run, found from a place in it and the seed alone.

    Examples come in the order of `make_order`, in windows of as many as fill a few batches; no
    window is longer than an epoch. Within a window, examples with equally many pictures and of
    one padded length stand together, so that hardly any of a batch is padding, and the batches
    come in random order.

    Packed, a window's examples share about as few batches as they fit into, evenly filled: nothing
    is carried over into the next window. Every window has the same
    number of examples, but not of batches. So that any window can still be found without those
    before it, each has places for as many batches as it might need (one row for each example); the
    places are None where there are fewer, and the batches stand evenly between.

    The text of all examples is prepared by every process, which needs no picture. So all
    processes of a job know the shapes of the whole batch.
    """

    def __init__(
        self, sources: Sources, make: ExampleMaker, config: DataConfig, num_batches: int, seed: int
    ):
        """Args: the records; what makes examples of them; of the settings, batch_size, lengths,
        packing and max_images; the length of the run in batches; the seed.
        """
        if len(sources) < config.batch_size:
            raise DataError(
                f"There are {len(sources)} conversations, fewer than "
                f"data.batch_size={config.batch_size}: lower it, or give more of them."
            )
        self._sources = sources
        self._make = make
        self._config = config
        self._lengths = np.array(config.lengths)
        self._seed = seed
        self._order = make_order(sources.lengths, sources.weights, seed)
        window_batches = min(WINDOW_BATCHES, len(sources) // config.batch_size)
        self._window_examples = window_batches * config.batch_size
        if config.packing:
            self._window_examples = self._examples_to_pack()
        self._window_places = -(-self._window_examples // config.batch_size)
        self._num_places = num_batches * (self._window_places if config.packing else 1)
        # The next window is made while batches of this one are.
        self._maker = ThreadPoolExecutor(max_workers=1)
        self._windows: OrderedDict[int, Future[list[PlannedBatch | None]]] = OrderedDict()
        # Threads ask in no fixed order, and where windows are short, for many at a time.
        apart = self.places_ahead + config.threads
        self._most_windows = 2 + -(-apart // self._window_places)
        self._lock = Lock()

    def __len__(self) -> int:
        """Places: one for each batch, or packed, enough for all of them."""
        return self._num_places

    @property
    def places_a_batch(self) -> int:
        """How far apart batches are, about."""
        return -(-self._window_places // WINDOW_BATCHES) if self._config.packing else 1

    @property
    def places_ahead(self) -> int:
        """How far to read ahead: so that each thread has about two batches to make."""
        return 2 * self._config.threads * self.places_a_batch

    def __getitem__(self, index: int) -> PlannedBatch | None:
        number, place = divmod(int(index), self._window_places)
        with self._lock:
            for near in (number, number + 1):
                if near not in self._windows and near * self._window_places < len(self):
                    self._windows[near] = self._maker.submit(self._window, near)
            self._windows.move_to_end(number)
            window = self._windows[number]
            while len(self._windows) > self._most_windows:
                self._windows.popitem(last=False)  # others may still wait for it: not cancelled
        return window.result()[place]

    def _window(self, number: int) -> list[PlannedBatch | None]:
        size = self._window_examples
        examples = [self._example(self._order[number * size + i]) for i in range(size)]
        if not self._config.packing:
            return list(self._batches([[example] for example in examples], number))
        batches = self._batches(self._packed(examples, self._config.batch_size), number)
        places: list[PlannedBatch | None] = [None] * self._window_places
        for index, batch in enumerate(batches):
            places[index * self._window_places // len(batches)] = batch
        return places

    def _batches(self, rows: Sequence[Row], number: int) -> list[PlannedBatch]:
        """Rows of one shape together, in random order."""
        padded = np.searchsorted(self._lengths, [_num_tokens(row) for row in rows])
        by_shape = np.lexsort((padded, np.array([_num_images(row) for row in rows])))
        rng = np.random.default_rng([self._seed, number])
        batches = rng.permutation(by_shape.reshape(-1, self._config.batch_size))
        return [self._planned([rows[i] for i in batch]) for batch in batches]

    def _packed(self, examples: Sequence[Example], multiple: int) -> list[Row]:
        return pack(examples, int(self._lengths[-1]), self._config.max_images, multiple)

    def _examples_to_pack(self) -> int:
        """The examples of a window that would need all but half a batch of `WINDOW_BATCHES`.

        They are estimated from the first ones; where they need more, it is a batch more, and all
        of them are then filled worse.
        """
        rows_wanted = (WINDOW_BATCHES - 0.5) * self._config.batch_size
        counted = min(max(self._window_examples, FEWEST_COUNTED), len(self._sources))
        first = [self._example(self._order[i]) for i in range(counted)]
        wanted = int(rows_wanted * counted / len(self._packed(first, 1)))
        return min(wanted, len(self._sources))

    def _example(self, number: int) -> Example:
        try:
            return self._make(number, self._sources.record(number, pictures=False))
        except BadRecord as problem:
            return self._make.without(number, problem)

    def _planned(self, rows: Sequence[Row]) -> PlannedBatch:
        num_images = max(map(_num_images, rows))
        if self._config.packing:
            most = self._config.max_images
            step = -(-most // MOST_IMAGE_SHAPES)
            num_images = min(-(-num_images // step) * step, most)
            return PlannedBatch(rows, int(self._lengths[-1]), num_images, is_packed=True)
        longest = max(map(_num_tokens, rows))
        length = int(self._lengths[np.searchsorted(self._lengths, longest)])
        return PlannedBatch(rows, length, num_images)


def _num_tokens(row: Row) -> int:
    return sum(len(example.ids) for example in row)


def _num_images(row: Row) -> int:
    return sum(example.num_images for example in row)
