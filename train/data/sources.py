"""Records of one or more sources, by number, checked as far as that is cheap."""

import os
import zlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from mllama_jax.train.data.files import RecordFile, open_files
from mllama_jax.train.data.formats import FORMATS, found_format, to_record
from mllama_jax.train.data.pictures import is_missing
from mllama_jax.train.data.records import BadRecord, DataError, Record, listed
from mllama_jax.train.data.settings import DataConfig, SourceConfig

_LOOKED_AT = 100
"""Records of which the first that is one of the known forms tells the form of all."""
_SAMPLED = 16
"""Records of a file too large to be checked whole that stand for it in the fingerprint."""


class Source:
    """The records of one entry of the configuration.

    Attributes:
        form: one of `FORMATS`.
        problems: of the records that are no conversations, which are left out, and of those with
            pictures that do not exist, which are not. Records of ArrayRecord files are checked
            only when they are read.
        fingerprint: a number that differs, if the text of the records does.
    """

    def __init__(self, config: SourceConfig, cache: str):
        """Args: what to read, and the folder for copies.

        Raises:
            FileNotFoundError, DataError: no file, or none that holds records.
        """
        self.config = config
        self._files = open_files(config.path, cache)
        self._starts = np.cumsum([0, *map(len, self._files)])
        if not self._starts[-1]:
            raise DataError(f"{config.path}: holds no conversations")
        self.form = self._found_form() if config.format == "auto" else config.format
        self.problems: list[BadRecord] = []
        self.fingerprint = 0
        self._rows = self._checked()

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int, pictures: bool = True) -> Record:
        """A record.

        Args:
            index: among those that are conversations.
            pictures: False may give empty bytes for the pictures: only their number counts.

        Raises:
            BadRecord: it is no conversation.
        """
        return self._record(int(self._rows[index]), pictures)

    def _at(self, row: int) -> tuple[RecordFile, int]:
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._files[place], row - int(self._starts[place])

    def _record(self, row: int, pictures: bool) -> Record:
        file, index = self._at(row)
        where = file.where(index)
        try:
            values = file.read(index, pictures)
        except ValueError as error:
            raise BadRecord(where, str(error)) from None
        return to_record(values, self.form, where, file.folder)

    def _found_form(self) -> str:
        """The form of the first record that has one."""
        first = ""
        for row in range(min(int(self._starts[-1]), _LOOKED_AT)):
            file, index = self._at(row)
            try:
                values = file.read(index, pictures=False)
            except ValueError:
                continue
            keys: list[str] = []
            if isinstance(values, dict):
                if form := found_format(values):
                    return form
                keys = [key for key, value in values.items() if value is not None]
            found = f"an object with {', '.join(keys)}" if keys else type(values).__name__
            first = first or f"{file.where(index)}: {found}"
        if not first:  # nothing can be read: the problems of all records say more
            return next(iter(FORMATS))
        keys = [f"{key!r} ({name})" for name, key in FORMATS.items()]
        raise DataError(
            f"{self.config.path}: the form of its records can't be told: expected exactly one of "
            f"the keys {', '.join(keys)}; found {first}. Name the form with format="
        )

    def _checked(self) -> np.ndarray:
        """The numbers of the records that are conversations, as far as that is cheap to know."""
        total = int(self._starts[-1])
        good = np.ones(total, bool)
        seen: dict[str, bool] = {}
        for row in range(total):
            if not self._at(row)[0].checks_are_cheap and row % max(1, total // _SAMPLED):
                continue
            try:
                record = self._record(row, pictures=False)
            except BadRecord as problem:
                self.problems.append(problem)
                good[row] = False
                text = str(problem)
            else:
                missing = [path for path in record.images if is_missing(path, seen)]
                if missing:
                    why = "; ".join(f"there is no picture {path!r}" for path in missing)
                    self.problems.append(BadRecord(record.where, why))
                folder = os.fspath(self._at(row)[0].folder)  # the data may be moved with it
                names = [x.removeprefix(folder) if isinstance(x, str) else x for x in record.images]
                text = f"{record.kind}{record.messages}{names}"
            self.fingerprint = zlib.crc32(text.encode("utf-8", "replace"), self.fingerprint)
        return np.flatnonzero(good)


class Sources:
    """The records of several sources under one numbering.

    Attributes:
        lengths: the number of records of each.
        weights: shares of the examples that come from each; None for their lengths.
        problems: as of `Source`, of all.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self.lengths = [len(source) for source in sources]
        self.weights = [source.config.weight for source in sources]
        self.problems = [problem for source in sources for problem in source.problems]
        self._starts = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int, pictures: bool = True) -> Record:
        """As `Source.record`."""
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[source].record(index - int(self._starts[source]), pictures)

    @property
    def fingerprint(self) -> tuple[int, ...]:
        """Numbers that differ, if the text of the records does."""
        return tuple(x for source in self.sources for x in (len(source), source.fingerprint))

    def describe(self) -> list[str]:
        """A line for each source."""
        given = [weight for weight in self.weights if weight is not None]
        shares: Sequence[float] = given or self.lengths
        return [
            f"{source.config.path}: {len(source):,} conversations, format {source.form}, "
            f"{share / sum(shares):.1%} of the examples"
            for source, share in zip(self.sources, shares, strict=True)
        ]


def open_sources(config: DataConfig) -> Sources:
    """Opens and checks what a run trains on.

    Raises:
        FileNotFoundError, DataError: no file, or none that holds records; more records than
            `config.max_bad_records` that can't be used, of which the first 20 are listed.
    """
    sources = Sources([Source(source, config.cache) for source in config.all_sources])
    check_problems(sources.problems, config.max_bad_records)
    empty = [source.config.path for source in sources.sources if not len(source)]
    if empty:
        raise DataError(f"{', '.join(empty)}: holds no conversations that can be used")
    return sources


def check_problems(problems: Sequence[BadRecord], limit: int) -> None:
    """Raises DataError if they are more than the limit."""
    if len(problems) > limit:
        most = f"; data.max_bad_records={limit}" if limit else ""
        raise DataError(f"The data can't be used{most}:{listed(problems)}")


def read_records(
    file: epath.PathLike, form: str = "auto", cache: str = DataConfig.cache
) -> list[Record]:
    """All records of a file, checked; for data that is small enough to be held in memory.

    Args:
        file: as `path` of an entry of ``data.sources``.
        form: one of `FORMATS`, or "auto", by the keys of the records.
        cache: folder for copies of files that can't be read in place.

    Raises:
        DataError: records that are no conversations, or whose pictures do not exist. The first 20
            problems are listed, and how many there are.
        FileNotFoundError: there is no such file.
    """
    source = Source(SourceConfig(str(file), form), cache)
    check_problems(source.problems, 0)
    return [source.record(index) for index in range(len(source))]
