"""``mllama-jax convert``: a checkpoint of one format becomes one of another."""

import ctypes
import json
import resource
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mllama_jax.cli.tables import columns

if TYPE_CHECKING:
    from mllama_jax.convert.conversion import Report
    from mllama_jax.convert.plan import Plan
    from mllama_jax.convert.progress import ByteProgress

_FORMATS = {"orbax": "Orbax", "hf": "Hugging Face safetensors", "meta": "Meta's format"}
# Half a unit in the last place, and for the smallest numbers of float16 an absolute one.
_ROUNDING = {"bfloat16": "--rtol 0.004", "float16": "--rtol 0.0005 --atol 6e-8"}
Dtype = Literal["float32", "bfloat16", "float16"]


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    to: Literal["orbax", "hf", "meta"] | None = None,
    dtype: Dtype | None = None,
    vision_dtype: Dtype | None = None,
    projector_dtype: Dtype | None = None,
    text_dtype: Dtype | None = None,
    text_only: bool = False,
    base: str | None = None,
    processor: str | None = None,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    workers: int | None = None,
    dry_run: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Turn a checkpoint of any format into one of another, exactly.

    It reads Hugging Face folders (safetensors or PyTorch's files), Meta's original release, Orbax
    checkpoints and training runs of this package, and LoRA adapters of PEFT, which it merges into
    their base. Tensors keep their dtype and every bit unless another
    dtype is asked for. A conversion that was stopped leaves nothing that loads; the same command
    goes on where it was.

    For example:
      $ mllama-jax convert meta-llama/Llama-3.2-11B-Vision-Instruct model-orbax
      $ mllama-jax convert --to hf model-orbax model-hf
      $ mllama-jax convert --to hf --processor hf-folder Llama-3.2-11B-Vision/original model-hf
      $ mllama-jax convert --to hf --base model-hf lora-adapter merged
      $ mllama-jax convert --to hf --text-only --dtype bfloat16 model-hf text-model
      $ mllama-jax convert --dry-run model-hf model-orbax

    Args:
        source: a folder, or a hub id (owner/name).
        destination: the folder to write; it must not exist, be empty, or hold what the same command
            left unfinished.
        to: format of the result: sharded for JAX, Hugging Face (Hub layout), or Meta's. By default
            hf for what is Orbax, and orbax for anything else.
        dtype: of all tensors; by default each keeps its own.
        vision_dtype: of the vision encoder; goes before --dtype, as the next two do.
        projector_dtype: of the projector between vision encoder and decoder.
        text_dtype: of the decoder.
        text_only: leave out vision encoder and projector.
        base: for a LoRA adapter, the model to merge it into; by default the one that it names.
        processor: folder or hub id whose tokenizer, image processor and chat template go along, in
            place of the source's.
        revision: branch, tag or commit of a hub id.
        max_shard_size: of the files of a Hugging Face folder.
        overwrite: replace the checkpoint, or the unfinished conversion, in the folder.
        workers: threads; by default one for each processor, 2 to 8.
        dry_run: only print which tensor becomes which, and the sizes.
        as_json: print one JSON document instead of a report.
    """
    from mllama_jax.convert.conversion import run_plan
    from mllama_jax.convert.plan import plan_conversion
    from mllama_jax.convert.progress import ByteProgress

    parts = {
        "vision_model": vision_dtype,
        "multi_modal_projector": projector_dtype,
        "language_model": text_dtype,
    }
    plan = plan_conversion(
        source,
        destination,
        to=to,
        dtype=dtype,
        dtypes={part: chosen for part, chosen in parts.items() if chosen is not None},
        text_only=text_only,
        base=base,
        processor=processor,
        revision=revision,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    if dry_run:
        print(json.dumps(mapping_json(plan), indent=2) if as_json else mapping(plan))
        return
    _keep_freed_memory()
    with ByteProgress(plan.total_bytes, "converting") as bar:
        done = run_plan(plan, workers=workers, progress=_after_the_first(bar))
    print(json.dumps(report_json(plan, done), indent=2) if as_json else report(plan, done))


def _keep_freed_memory() -> None:
    """Lets the C library use the memory of one block for the next.

    It would give each back to the system and ask for it anew, which takes a tenth of the time.
    """
    with suppress(OSError, AttributeError):  # where it is not glibc
        library = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3
        library.mallopt(trim_threshold, 2**30)
        library.mallopt(mmap_threshold, 2**30)


def _after_the_first(bar: "ByteProgress") -> Callable[[int], None]:
    """What counts for the bar; the first number is what an earlier process did."""
    count = bar.skip

    def add(num_bytes: int) -> None:
        nonlocal count
        count(num_bytes)
        count = bar.add

    return add


def mapping_json(plan: "Plan") -> dict[str, Any]:
    """Every tensor of the result: what it is made from, shape, dtype and bytes."""
    return {
        **_ends(plan),
        "bytes": plan.total_bytes,
        "free_bytes": _free_bytes(plan.folder),
        "tensors": [
            {
                "source": output.source,
                "source_shape": _shape(plan.source.tensors.get(output.source)),
                "source_dtype": str(output.values.dtype),
                "name": output.name,
                "shape": list(output.shape),
                "dtype": str(output.dtype),
                "bytes": output.num_bytes,
            }
            for output in plan.outputs
        ],
    }


def mapping(plan: "Plan") -> str:
    """The same for people: a line for all layers in which a tensor has the same shape and dtype."""
    from mllama_jax.convert.mismatch import without_layer
    from mllama_jax.convert.progress import size

    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for tensor in mapping_json(plan)["tensors"]:
        texts = {key: without_layer(str(value)) for key, value in tensor.items()}
        groups.setdefault(tuple(texts.values()), []).append(tensor)
    rows = [_mapping_row(group) for group in groups.values()]
    lines = [
        columns(rows, right=(7,)),
        "",
        f"{len(plan.outputs)} tensors, {size(plan.total_bytes)}, into {plan.folder} ({plan.to}); "
        f"{size(_free_bytes(plan.folder))} are free there. Nothing was written.",
    ]
    return "\n".join([*lines, *(f"Note: {note}" for note in plan.source.notes)])


def _mapping_row(group: list[dict[str, Any]]) -> tuple[str, ...]:
    """A tensor of several layers, or of one."""
    from mllama_jax.convert.mismatch import merged
    from mllama_jax.convert.progress import size

    first = group[0]
    sources, names = [tensor["source"] for tensor in group], [tensor["name"] for tensor in group]
    return (
        ", ".join(merged(dict.fromkeys(sources))),
        _shape_text(first["source_shape"]),
        first["source_dtype"],
        "->",
        "same name" if names == sources else ", ".join(merged(names)),
        _shape_text(first["shape"]),
        first["dtype"],
        size(sum(tensor["bytes"] for tensor in group)),
    )


def _ends(plan: "Plan") -> dict[str, Any]:
    return {
        "source": str(plan.source.path),
        "format": plan.source.format,
        "revision": plan.source.revision,
        "folder": str(plan.folder),
        "to": plan.to,
        "component": plan.component,
        "notes": list(plan.source.notes),
    }


def _shape(tensor: Any) -> list[int] | None:
    """None for what is not one tensor of the source."""
    return None if tensor is None else list(tensor.shape)


def _shape_text(shape: list[int] | None) -> str:
    return "" if shape is None else f"({', '.join(map(str, shape))})"


def _free_bytes(folder: Path) -> int:
    """Of the disk on which a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def report_json(plan: "Plan", done: "Report") -> dict[str, Any]:
    """What was done, for scripts."""
    return {
        **_ends(plan),
        "tensors": done.num_tensors,
        "bytes": done.num_bytes,
        "resumed_bytes": done.resumed_bytes,
        "seconds": done.seconds,
        "bytes_per_second": _rate(done),
        "peak_memory_bytes": _peak_memory(),
    }


def report(plan: "Plan", done: "Report") -> str:
    """What was done, and what to do next, for people."""
    from mllama_jax.convert.progress import duration, size
    from mllama_jax.convert.table import COMPONENTS

    resumed = f", {size(done.resumed_bytes)} of it before" if done.resumed_bytes else ""
    architecture = COMPONENTS[plan.component].architecture
    return "\n".join(
        [
            f"{done.folder}: {architecture} as {_FORMATS[done.to]}",
            f"  {done.num_tensors} tensors, {size(done.num_bytes)}{resumed}, in "
            f"{duration(done.seconds)} ({_rate(done) / 1e9:.2f} GB/s, peak memory "
            f"{size(_peak_memory())})",
            *(f"Note: {note}" for note in done.notes),
            "To compare it with the source:",
            f"  mllama-jax verify {_verify_options(plan)}{_quoted(plan.source.path)} "
            f"{_quoted(done.folder)}",
            "To load it:",
            f"  model, params = mllama_jax.{architecture}.from_pretrained({str(done.folder)!r})",
        ]
    )


def _verify_options(plan: "Plan") -> str:
    """What makes a comparison succeed although numbers were rounded."""
    narrowed = {
        str(output.dtype)
        for output in plan.outputs
        if output.dtype != output.values.dtype and str(output.dtype) != "float32"
    }
    changed = any(output.dtype != output.values.dtype for output in plan.outputs)
    tolerance = " ".join(_ROUNDING[dtype] for dtype in sorted(narrowed)[:1])
    tolerance = tolerance or ("--atol 0" if changed else "")
    base = plan.options.get("base")
    options = [tolerance, "" if base is None else f"--base {_quoted(base)}"]
    return "".join(f"{option} " for option in options if option)


def _quoted(path: object) -> str:
    return shlex.quote(str(path))


def _rate(done: "Report") -> float:
    return (done.num_bytes - done.resumed_bytes) / max(done.seconds, 1e-9)


def _peak_memory() -> int:
    """The most that this process has had in memory, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
