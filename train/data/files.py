"""Files of records that are read at any place, without being held in memory."""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from etils import epath

from mllama_jax.train.data.pictures import is_in_bucket
from mllama_jax.train.data.records import DataError

PICTURE_COLUMNS = ("image", "images")


class RecordFile(Protocol):
    """Records by number. Reading is thread-safe."""

    folder: epath.Path
    """What relative paths of pictures start at."""
    checks_are_cheap: bool
    """Whether all records can be looked at before training without reading all pictures."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """Names a record, for messages."""

    def read(self, index: int, pictures: bool) -> Any:
        """A record as plain values.

        Args:
            index: its number in the file.
            pictures: False lets the file put ``b""`` for the bytes of pictures, which is faster.

        Raises:
            ValueError: it can't be read as a record; the message says why.
        """


def open_files(path: str, cache: str) -> list[RecordFile]:
    """Opens a file, a folder of a saved data set, or all files that a pattern (``*``) fits.

    Args:
        path: its ending tells the kind of file, see ``docs/data.md``.
        cache: folder on this machine for copies of what can't be read in place: files in buckets,
            and Parquet as Arrow.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: no kind of file that can be read.
    """
    given = epath.Path(path).expanduser()
    found = [given]
    if "*" in given.name:
        found = sorted(given.parent.glob(given.name))
    if not found or not found[0].exists():
        raise FileNotFoundError(f"There is no data file {path!r}.")
    return [_open_file(file, epath.Path(cache).expanduser()) for file in found]


def _open_file(file: epath.Path, cache: epath.Path) -> RecordFile:
    if file.is_dir():
        return ArrowTable(file, [_local(part, cache) for part in _parts(file)])
    if file.suffix == ".parquet":
        return ArrowTable(file, [_cached(file, cache, ".arrow", _parquet_to_arrow)])
    if file.suffix == ".arrow":
        return ArrowTable(file, [_local(file, cache)])
    if file.suffix in (".array_record", ".arrayrecord"):
        return ArrayRecords(file, _local(file, cache))
    if file.suffix == ".json" and _is_json_list(file):
        return JsonLines(file, _cached(file, cache, ".jsonl", _list_to_lines), f"{file}: item ")
    if file.suffix in (".jsonl", ".json"):
        return JsonLines(file, _local(file, cache), f"{file}:")
    raise DataError(
        f"{file}: not a kind of file that holds records here: expected .jsonl, .json, .parquet, "
        ".arrow, .array_record, or a folder that Hugging Face's save_to_disk wrote"
    )


class JsonLines:
    """A JSON object a line; only where the lines start is held in memory."""

    checks_are_cheap = True

    def __init__(self, file: epath.Path, local: Path, label: str):
        """Args: the file as the user names it; where it can be read; what stands before a line's
        number, counted from 1, to name its record."""
        self.folder = file.parent
        self._label = label
        # Bytes: JSON may hold characters that str.splitlines would end a line at.
        numbers, starts, stop = array("q"), array("q"), 0
        with local.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    numbers.append(number)
                    starts.append(stop)
                stop += len(line)
        self._numbers = np.array(numbers, np.int64)
        self._edges = np.array([*starts, stop], np.int64)
        self._opened = local.open("rb")

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        return f"{self._label}{self._numbers[index]}"

    def read(self, index: int, pictures: bool) -> Any:
        start, stop = self._edges[index : index + 2].tolist()
        line = os.pread(self._opened.fileno(), stop - start, start)
        try:
            # Empty lines may follow; they are white space to JSON.
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None

    def __del__(self) -> None:
        if hasattr(self, "_opened"):
            self._opened.close()


class ArrowTable:
    """Rows of Arrow files, which are mapped into memory and read as far as they are asked for."""

    checks_are_cheap = True

    def __init__(self, file: epath.Path, parts: Sequence[Path]):
        """Args: the file or folder as the user names it, and its Arrow files."""
        self.folder = file if file.is_dir() else file.parent
        self._file = file
        self._batches = [batch for part in parts for batch in _arrow_batches(part)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, index: int) -> str:
        return f"{self._file}: row {index}"

    def read(self, index: int, pictures: bool) -> Any:
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = self._batches[place].slice(index - int(self._starts[place]), 1)
        values = {}
        for name, column in zip(row.schema.names, row.columns, strict=True):
            is_left_out = name in PICTURE_COLUMNS and not pictures
            values[name] = _placeholder(column[0]) if is_left_out else column[0].as_py()
        return values


class ArrayRecords:
    """An ArrayRecord file of JSON objects."""

    checks_are_cheap = False  # the pictures are in the JSON

    def __init__(self, file: epath.Path, local: Path):
        """Args: the file as the user names it, and where it can be read."""
        self.folder = file.parent
        self._file = file
        self._source = grain.sources.ArrayRecordDataSource([str(local)])

    def __len__(self) -> int:
        return len(self._source)

    def where(self, index: int) -> str:
        return f"{self._file}: record {index}"

    def read(self, index: int, pictures: bool) -> Any:
        try:
            return json.loads(self._source[index])
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None


# --- JSON ----------------------------------------------------------------------------------------


def _is_json_list(file: epath.Path) -> bool:
    """Whether the file is one list, as LLaVA's are, and not an object a line."""
    with file.open("rb") as opened:
        return opened.read(1024).lstrip().startswith(b"[")


def _list_to_lines(source: epath.Path, target: Path) -> None:
    try:
        values = json.loads(source.read_bytes())
    except ValueError as error:
        raise DataError(f"{source}: begins as a JSON list, but is not JSON: {error}") from None
    with target.open("w") as out:
        out.writelines(json.dumps(value) + "\n" for value in values)


# --- Arrow ----------------------------------------------------------------------------------------


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet and Arrow files are read with pyarrow: pip install 'mllama-jax[data]'"
        ) from error
    return pyarrow


def _arrow_batches(file: Path) -> Iterator[Any]:
    """The record batches of a file in Arrow's stream or file format, not copied."""
    pa = _arrow()
    mapped = pa.memory_map(str(file))
    try:
        yield from pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        try:
            reader = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid as error:
            raise DataError(f"{file}: not an Arrow file: {error}") from None
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _placeholder(scalar: Any) -> Any:
    """What a record's picture column holds, with ``b""`` for the bytes of each picture."""
    if not scalar.is_valid:
        return None
    pa = _arrow()
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar):
        return [_placeholder(item) for item in scalar.values]
    if isinstance(scalar, pa.StructScalar):
        return {name: _placeholder(scalar[name]) for name in scalar}
    is_bytes = pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type)
    return b"" if is_bytes else scalar.as_py()


def _parquet_to_arrow(source: epath.Path, target: Path) -> None:
    """Parquet can't be read at any place without decompressing all that stands around it."""
    pa = _arrow()
    with source.open("rb") as file:
        try:
            parquet = pa.parquet.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DataError(f"{source}: not a Parquet file: {error}") from None
        with pa.OSFile(str(target), "wb") as out, pa.ipc.new_stream(out, parquet.schema_arrow) as w:
            for batch in parquet.iter_batches(batch_size=64):
                w.write_batch(batch)


def _parts(folder: epath.Path) -> list[epath.Path]:
    """The Arrow files of a data set that Hugging Face's ``save_to_disk`` wrote."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise DataError(
            f"{folder}: holds the splits {', '.join(splits)}; give the folder of one, such as "
            f"{folder / splits[0]}"
        )
    state = folder / "state.json"
    if not state.exists():
        raise DataError(
            f"{folder}: a folder without state.json, which Hugging Face's save_to_disk writes; for "
            f"several files give a pattern, such as {folder / '*.parquet'}"
        )
    return [folder / item["filename"] for item in json.loads(state.read_text())["_data_files"]]


# --- copies on this machine -----------------------------------------------------------------------


def _local(file: epath.Path, cache: epath.Path) -> Path:
    """The file, or a copy of it if it lies in a bucket."""
    if not is_in_bucket(file):
        return Path(file)
    return _cached(file, cache, file.suffix, _copy)


def _copy(source: epath.Path, target: Path) -> None:
    with source.open("rb") as file, target.open("wb") as out:
        while piece := file.read(2**24):
            out.write(piece)


def _cached(
    file: epath.Path, cache: epath.Path, suffix: str, make: Callable[[epath.Path, Path], None]
) -> Path:
    """What `make` makes of a file, kept until the file changes."""
    if is_in_bucket(file):
        found = file.stat()
        known_by = f"{os.fspath(file)} {found.length} {found.mtime}"
    else:
        local = os.stat(file)
        known_by = f"{os.fspath(file.resolve())} {local.st_size} {local.st_mtime_ns}"
    name = f"{file.stem}-{hashlib.sha256(known_by.encode()).hexdigest()[:16]}{suffix}"
    target = Path(cache / name)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Other processes of this machine may be making the same.
        unfinished = target.with_name(f".{name}.{os.getpid()}.incomplete")
        try:
            make(file, unfinished)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    return target
