"""The weight files of a Hugging Face folder, and the index that says which tensor is in which."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from etils import epath

from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import LazyTensor
from mllama_jax.convert.sources.safetensors_files import read_file_header
from mllama_jax.convert.sources.torch_files import read_torch_headers

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class WeightFiles:
    """How a folder's weight files are named, and how one of them is read."""

    title: str
    single: str
    suffix: str
    read: Callable[[epath.Path], Mapping[str, LazyTensor]]

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    @property
    def pattern(self) -> str:
        """Of all files of the kind."""
        return (
            f"*{self.suffix}" if self.suffix == ".safetensors" else f"pytorch_model*{self.suffix}"
        )


def _read_safetensors(file: epath.Path) -> dict[str, LazyTensor]:
    return {tensor.name: tensor for tensor in read_file_header(file)}


SAFETENSORS = WeightFiles("safetensors", SINGLE_NAME, ".safetensors", _read_safetensors)
TORCH = WeightFiles("PyTorch .bin", "pytorch_model.bin", ".bin", read_torch_headers)


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder, by name in the order of the files, and the files."""

    kind: WeightFiles
    tensors: Mapping[str, LazyTensor]
    files: tuple[epath.Path, ...]


def find_weights(folder: str | os.PathLike) -> Weights:
    """Every tensor in a folder's weight files; no tensor is read.

    safetensors are preferred to PyTorch's files where a folder has both. The files are those that
    the index names; without an index the single file; without that every file of the kind.

    Raises:
        FileNotFoundError: the folder holds no weights.
        CheckpointError: an index that names absent files or tensors, or leaves out tensors;
            truncated or damaged files; a tensor that two files hold. All of it in one message.
    """
    path = epath.Path(folder)
    for kind in (SAFETENSORS, TORCH):
        problems: list[str] = []
        files, weight_map = _files(path, kind, problems)
        if files or problems:
            tensors = _read_all(path, kind, files, weight_map, problems)
            return Weights(kind, tensors, tuple(files))
    beside = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    raise FileNotFoundError(
        f"{os.fspath(path)}: no {SAFETENSORS.single}, {SAFETENSORS.index}, other *.safetensors "
        f"or {TORCH.single}; found "
        + (", ".join(beside[:12]) + (", …" if len(beside) > 12 else "") or "nothing")
    )


def _read_all(
    folder: epath.Path,
    kind: WeightFiles,
    files: Sequence[epath.Path],
    weight_map: Mapping[str, str] | None,
    problems: list[str],
) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    holders: dict[str, list[str]] = {}
    unreadable: set[str] = set()
    for file in files:
        try:
            found = kind.read(file)
        except CheckpointError as error:
            problems.append(str(error))
            unreadable.add(file.name)
            continue
        for name, tensor in found.items():
            tensors[name] = tensor
            holders.setdefault(name, []).append(file.name)
    problems += [
        f"{name}: held by {' and '.join(names)}; expected one file"
        for name, names in holders.items()
        if len(names) > 1
    ]
    if weight_map is not None:
        unread = unreadable | _absent(folder, weight_map)
        problems += _index_problems(holders, weight_map, unread, kind.index)
    if problems:
        raise CheckpointError(
            f"{os.fspath(folder)} can't be read:\n" + "\n".join(f"  {p}" for p in problems)
        )
    return tensors


def _files(
    folder: epath.Path, kind: WeightFiles, problems: list[str]
) -> tuple[list[epath.Path], dict[str, str] | None]:
    """The files to read, and the index's map from tensor to file name if there is an index."""
    index, single = folder / kind.index, folder / kind.single
    if index.exists():
        weight_map = _read_index(index, kind, problems)
        if kind.single not in weight_map.values() and single.exists():
            problems.append(
                f"{kind.single} lies beside {kind.index}, which does not name it: two checkpoints "
                "in one folder; remove the one that is not meant"
            )
        absent = _absent(folder, weight_map)
        problems += [f"{name}: named by {kind.index}, but absent" for name in sorted(absent)]
        return [folder / name for name in sorted({*weight_map.values()} - absent)], weight_map
    if single.exists():
        return [single], None
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    found = [n for n in names if fnmatchcase(n, kind.pattern) and not n.startswith(".")]
    return [folder / name for name in sorted(found)], None


def _absent(folder: epath.Path, weight_map: Mapping[str, str]) -> set[str]:
    return {name for name in set(weight_map.values()) if not (folder / name).exists()}


def _read_index(index: epath.Path, kind: WeightFiles, problems: list[str]) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        # A name with a folder in it could lead out of the checkpoint.
        plain = all(
            isinstance(file, str) and file.endswith(kind.suffix) and "/" not in file
            for file in weight_map.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(
            f"{index.name}: expected JSON with a weight_map from tensor to file: {error!r}"
        )
        return {}
    if not plain:
        problems.append(f"{index.name}: weight_map may only name *{kind.suffix} of the same folder")
        return {}
    return weight_map


def _index_problems(
    holders: Mapping[str, list[str]], weight_map: Mapping[str, str], unread: set[str], index: str
) -> Iterator[str]:
    """Where an index and the files that could be read disagree."""
    for name, file in weight_map.items():
        held = holders.get(name, ())
        if file not in unread and file not in held:
            instead = f"; {' and '.join(held)} does" if held else ""
            yield f"{name}: {index} puts it in {file}, which does not hold it{instead}"
    for name, files in holders.items():
        if name not in weight_map:
            yield f"{name}: held by {files[0]}, but {index} does not name it"
