"""What answers depend on, in a few characters: a file of requests, and a checkpoint."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from mllama_jax.cloud import is_cloud, read_range
from mllama_jax.convert import Source

__all__ = ["check_requests", "processor_identity", "requests_identity", "weights_identity"]

_READ_BYTES = 2**22
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
_CHANGES_ANSWERS = (".json", ".jinja", ".model")
"""Of the files beside the weights; the others are for people."""


def requests_identity(file: Path) -> dict[str, Any]:
    """The whole content of a file, JSON values; a last line has its end, whether written or not."""
    size, found = _digests(file, ())
    return {"bytes": size, "sha256": found[size]}


def check_requests(results: Path, then: Mapping[str, Any] | None, file: Path) -> None:
    """Raises FileExistsError unless the requests are those of an earlier `requests_identity`, with
    or without new lines behind them."""
    if then is None:
        return
    _, found = _digests(file, (then["bytes"],))
    if found.get(then["bytes"]) != then["sha256"]:
        raise FileExistsError(
            f"{file} has changed since {results} was begun, within the first {then['bytes']:,} "
            "bytes, so results there may be of other requests. Lines may be added at the end; if "
            "lines whose result is an error were repaired, give --retry-errors; otherwise give "
            "another output"
        )


def _digests(file: Path, sizes: Collection[int]) -> tuple[int, dict[int, str]]:
    """The size of a file, with the end of its last line, and the SHA-256 of all of it and of the
    first so many bytes."""
    digest, size, last = hashlib.sha256(), 0, b"\n"
    found = {0: digest.hexdigest()}
    with file.open("rb") as opened:
        while True:
            ahead = min((s - size for s in sizes if s > size), default=_READ_BYTES)
            data = opened.read(min(ahead, _READ_BYTES))
            if not data and last != b"\n":
                data = b"\n"
            if not data:
                break
            digest.update(data)
            size, last = size + len(data), data[-1:]
            if size in sizes:
                found[size] = digest.hexdigest()
    return size, {**found, size: digest.hexdigest()}


def processor_identity(source: Source) -> str:
    """Of a checkpoint's tokenizer, chat template, image processor and generation settings."""
    digest = hashlib.sha256()
    for file in source.carried:
        if file.suffix in _CHANGES_ANSWERS:
            digest.update(f"{file.name}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def weights_identity(source: Source) -> str:
    """Of a checkpoint's weights: tensors' names, shapes and types, sizes of files, and a sample of
    their bytes. Reading all of them would take as long as loading them."""
    digest = hashlib.sha256()
    for name in sorted(source.tensors):
        tensor = source.tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
    files = sorted((source.label(file), file, file.stat().length) for file in source.files)
    for label, _, size in files:
        digest.update(f"{label} {size}\0".encode())
    for file, start in _places([(file, size) for _, file, size in files]):
        digest.update(_read(file, start))
    return digest.hexdigest()[:16]


def _places(files: Iterable[tuple[epath.Path, int]]) -> list[tuple[epath.Path, int]]:
    """Evenly spread over all files, one behind the other."""
    files = list(files)
    total = sum(size for _, size in files)
    step = max(total // _NUM_SAMPLES, _SAMPLE_BYTES)
    places = []
    before = 0
    for file, size in files:
        first = -(-before // step) * step
        places += [(file, at - before) for at in range(first, before + size, step)]
        before += size
    return places


def _read(file: epath.Path, start: int) -> bytes:
    if is_cloud(file):
        return read_range(file, start, min(start + _SAMPLE_BYTES, file.stat().length))
    with open(file, "rb") as opened:
        opened.seek(start)
        return opened.read(_SAMPLE_BYTES)
