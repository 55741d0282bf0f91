"""A folder that is, at every moment, the earlier checkpoint, the new one, or visibly none.

Everything is written and flushed to disk under names ending in `.incomplete` first. Only then do
the weights, indices and config.json of an earlier checkpoint go, and the new files get their names,
config.json last: without it nothing loads what is there.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress

from etils import epath

_LAST = ("config.json", "params.json")
"""What makes a folder a model: it goes first and comes last."""
_UNFINISHED = ".incomplete"
_PLACING = ".placing"
# What the formats that are written consist of; anything else in a folder is not ours to remove.
_WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|consolidated\.00\.pth|params\.json"
    r"|state|orbax\.checkpoint|_CHECKPOINT_METADATA|commit_success\.txt"
    r"|provenance\.json|config\.json"
)


def unfinished(folder: epath.Path, name: str) -> epath.Path:
    """Where a file or folder lies until everything is whole."""
    return folder / f".{name}{_UNFINISHED}"


def remove_unfinished(folder: epath.Path) -> None:
    """Removes what an earlier process left half-written."""
    for path in _all_unfinished(folder):
        _remove(path)
    (folder / _PLACING).unlink(missing_ok=True)


def finish_folder(folder: epath.Path, files: Mapping[str, bytes]) -> None:
    """Puts everything unfinished in its place, and these files, for an earlier checkpoint.

    `is_placing` holds from when the earlier checkpoint is gone until the caller's `unmark`.

    Args:
        files: name -> contents of what goes with the weights, config.json among them. Files with
            other names stay.
    """
    for name, contents in files.items():
        with unfinished(folder, name).open("wb") as stream:
            stream.write(contents)
            stream.flush()
            with suppress(OSError, AttributeError):
                os.fsync(stream.fileno())
    flush_folder(folder)
    _remove_earlier(folder)
    (folder / _PLACING).touch()
    flush_folder(folder)
    place(folder)


def is_placing(folder: epath.Path) -> bool:
    """Whether a process was stopped when all was written, but not all had its name."""
    return (folder / _PLACING).exists()


def place(folder: epath.Path) -> None:
    """Gives everything unfinished its name; may be done again by another process."""
    names = {
        path.name.removeprefix(".").removesuffix(_UNFINISHED): path
        for path in _all_unfinished(folder)
    }
    for name in sorted(names, key=lambda name: (name in _LAST, name)):
        if name in _LAST:
            flush_folder(folder)
        names[name].replace(folder / name)
    flush_folder(folder)


def unmark(folder: epath.Path) -> None:
    """The last step: nothing is left to be placed."""
    (folder / _PLACING).unlink(missing_ok=True)


def _all_unfinished(folder: epath.Path) -> list[epath.Path]:
    return [
        path
        for path in folder.iterdir()
        if path.name.startswith(".") and path.name.endswith(_UNFINISHED)
    ]


def _remove_earlier(folder: epath.Path) -> None:
    """Removes an earlier checkpoint, what makes it one first."""
    earlier = [path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name)]
    for path in sorted(earlier, key=lambda path: path.name not in _LAST):
        _remove(path)
        if path.name in _LAST:
            flush_folder(folder)
    flush_folder(folder)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def flush_folder(folder: epath.Path) -> None:
    """Makes renames and removals last through a power failure, where the file system can."""
    with suppress(OSError):
        handle = os.open(os.fspath(folder), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
