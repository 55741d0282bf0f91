"""Results in the order of their requests, out of one file or of several that shared a job."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mllama_jax.batch.identity import check_requests
from mllama_jax.batch.inputs import RequestsFile, Shard, Source, keyed, result_key
from mllama_jax.batch.requests import Request, RequestError
from mllama_jax.batch.results_file import (
    check_same,
    read_job,
    read_results,
    replace_file,
    write_job,
)

__all__ = ["merge_shards", "results_in_order"]

_MOST_NAMED = 5


def merge_shards(source: Source, output: Path) -> int:
    """Joins ``results.I-of-N.jsonl`` of all I to ``results.jsonl``, in the order of the requests.

    Each request has one line in it. The files that are joined stay.

    Args:
        source: all requests of the job.
        output: ``results.jsonl``; replaced if it is an earlier result of the same.

    Returns:
        How many of the lines are errors.

    Raises:
        FileNotFoundError: there are no such files, or not all N.
        FileExistsError: the files belong to different jobs; the output is something else.
        ValueError: requests without a result: some shard is not complete.
    """
    paths = shard_paths(output)
    fingerprint = _common_fingerprint(paths)
    if isinstance(source, RequestsFile):
        for path in paths:
            check_requests(
                path, (read_job(path) or {"kept": {}})["kept"].get("requests"), source.path
            )
    job = read_job(output)
    if output.exists() and (job is None or not job["kept"].get("merged")):
        raise FileExistsError(
            f"{output} exists, and is not the merged result of several processes: give another "
            "output"
        )
    write_job(output, fingerprint, {"merged": len(paths)})
    num_errors = 0

    def lines() -> Iterator[bytes]:
        nonlocal num_errors
        missing: list[int] = []
        for number, line in _lines_in_order(source, paths):
            if line is None:
                missing.append(number)
                continue
            num_errors += json.loads(line)["error"] is not None
            yield line
        if missing:
            shards = sorted({number % len(paths) for number in missing})
            some = ", ".join(map(str, missing[:_MOST_NAMED]))
            raise ValueError(
                f"{len(missing)} requests have no result yet (line {some}"
                f"{', …' if len(missing) > _MOST_NAMED else ''}): finish "
                + ", ".join(f"--shard {index}/{len(paths)}" for index in shards[:_MOST_NAMED])
                + (", …" if len(shards) > _MOST_NAMED else "")
            )

    replace_file(output, lines())
    return num_errors


def shard_paths(output: Path) -> list[Path]:
    """The files of all parts of a job, as `Shard.path` names them.

    Raises:
        FileNotFoundError: there are none, or some are missing.
        FileExistsError: there are those of jobs with another number of parts.
    """
    pattern = re.compile(
        rf"{re.escape(output.stem)}\.(\d+)-of-(\d+){re.escape(output.suffix)}", re.ASCII
    )
    folder = output.parent
    found = [pattern.fullmatch(file.name) for file in folder.iterdir()] if folder.is_dir() else []
    counts = sorted({int(match[2]) for match in found if match})
    if not counts:
        example = Shard(0, 2).path(output)
        raise FileNotFoundError(
            f"nothing to merge: no files such as {example}; run the job with --shard first"
        )
    if len(counts) > 1:
        raise FileExistsError(
            f"{folder} has files of jobs of {' and '.join(map(str, counts))} parts for "
            f"{output.name}: remove those that are not meant"
        )
    paths = [Shard(index, counts[0]).path(output) for index in range(counts[0])]
    if missing := [path.name for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"{folder}: {', '.join(missing[:_MOST_NAMED])}"
            f"{', …' if len(missing) > _MOST_NAMED else ''} missing: run "
            "the job with that --shard, or bring the file here"
        )
    return paths


def results_in_order(
    source: Source, paths: Sequence[Path]
) -> Iterator[tuple[Request | None, dict[str, Any]]]:
    """Results with their requests (None for what could not be read), in the requests' order."""
    entries = (entry for entry, _, _ in keyed(source))
    lines = _lines_in_order(source, paths)
    for entry, (_, line) in zip(entries, lines, strict=True):
        if line is None:
            continue
        try:
            request = source.request(entry)
        except RequestError:
            request = None
        yield request, json.loads(line)


def _lines_in_order(source: Source, paths: Sequence[Path]) -> Iterator[tuple[int, bytes | None]]:
    """For each entry its number and its result; None if there is none."""
    # Only where each line is: all of them could be more than the memory.
    places: dict[bytes, int] = {}
    for index, path in enumerate(paths):
        for offset, _, line in read_results(path):
            places[result_key(line)] = offset * len(paths) + index
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        for entry, key, _ in keyed(source):
            place = places.get(key)
            if place is None:
                yield entry.number, None
                continue
            offset, index = divmod(place, len(paths))
            files[index].seek(offset)
            yield entry.number, files[index].readline()


def _common_fingerprint(paths: Sequence[Path]) -> dict[str, Any]:
    jobs = [read_job(path) for path in paths]
    fingerprints = [{} if job is None else job["fingerprint"] for job in jobs]
    for path, fingerprint in zip(paths, fingerprints, strict=True):
        check_same(path, fingerprint, fingerprints[0])
    return fingerprints[0]
