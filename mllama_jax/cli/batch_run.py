"""What ``mllama-jax batch`` does, from the options to the exit status."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama_jax.cli.answering import JobOptions, Work, defaults, merge, run

if TYPE_CHECKING:
    from mllama_jax.batch.inputs import Source
    from mllama_jax.batch.pictures import PictureSources


@dataclass(frozen=True, kw_only=True)
class BatchOptions(JobOptions):
    """Of the command, by the same names."""

    input_file: Path | None
    image_folder: Path | None
    prompt: str | None
    allow_folder: tuple[Path, ...]
    allow_remote: bool
    report: Path | None
    shard: str | None
    merge: bool


def run_batch(options: BatchOptions) -> int:
    """What ``mllama-jax batch`` does; returns its exit status."""
    from mllama_jax.batch.inputs import Shard

    shard = Shard.parse(options.shard) if options.shard else Shard()
    if options.report is not None and options.distributed and shard.count > 1:
        raise ValueError(
            "--report with --shard and --distributed: no process has the results of a whole shard; "
            "give --report with --merge, when all are done"
        )
    if options.merge:
        source = _source(options)
        status = merge(source, options.output_file)
        if options.report is not None:
            _report(options, source, options.output_file, options.report)
        return status

    def finish(work: Work, path: Path, is_complete: bool) -> None:
        if options.report is not None:
            _report(options, work.source, path, shard.path(options.report))

    return run(options, shard, lambda: _work(options), finish)


def _work(options: BatchOptions) -> Work:
    requests = options.image_folder or options.input_file
    identity = {"requests": str(requests and requests.resolve()), "prompt": options.prompt}
    source = _source(options, defaults(options))
    return Work(source, _picture_sources(options), identity, options.input_file)


def _source(options: BatchOptions, defaults: Any = None) -> "Source":
    from mllama_jax.batch.inputs import PictureFolder, RequestsFile

    if (options.input_file is None) == (options.image_folder is None):
        raise ValueError("give -i, a file of requests, or --image-folder: one of them")
    if options.input_file is not None:
        if options.prompt is not None:
            raise ValueError("--prompt belongs to --image-folder; the lines of -i have their own")
        return RequestsFile(options.input_file, defaults)
    assert options.image_folder is not None
    if options.prompt is None:
        raise ValueError("--image-folder needs --prompt: what to ask about each picture")
    return PictureFolder(options.image_folder, options.prompt, defaults)


def _picture_sources(options: BatchOptions) -> "PictureSources":
    from mllama_jax.batch.pictures import PictureSources

    for folder in options.allow_folder:
        if not folder.is_dir():
            raise ValueError(f"--allow-folder {folder}: no such folder")
    implied = options.image_folder
    if implied is None and options.input_file is not None and not options.allow_folder:
        implied = options.input_file.parent
    folders = (*options.allow_folder, *([] if implied is None else [implied]))
    return PictureSources(folders, options.allow_remote)


def _report(options: BatchOptions, source: "Source", results: Path, path: Path) -> None:
    from mllama_jax.batch.merge import results_in_order
    from mllama_jax.batch.report import write_report

    lines = results_in_order(source, [results])
    name = "" if options.model is None else options.model
    write_report(path, lines, sources=_picture_sources(options), model_name=name)
    print(f"{path}: a page to look at", flush=True)
