"""From a path or a Hugging Face hub id to a folder that can be read."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from etils import epath

from mllama_jax.cloud import check_folder, is_cloud

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.md", "*.model", "LICENSE*")
"""What is fetched beside weights: configuration, processor, tokenizer, template, licence."""

_WEIGHTS = (
    ("*.safetensors",),
    ("pytorch_model*.bin", "adapter_model.bin", "consolidated*.pth"),
)
"""Weight files in the order of preference; the second kind only if there is none of the first."""

_ORBAX_MARK = "_METADATA"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_HUB_FOLDER = re.compile(rf"({_HUB_ID.pattern})(?:/([\w-][\w.-]*))?", re.ASCII)


def local_folder(
    path: str | os.PathLike,
    *,
    allow_patterns: Sequence[str],
    revision: str | None = None,
) -> epath.Path:
    """The folder that holds a checkpoint, fetched from the Hugging Face hub where need be.

    An existing folder (local, `~/…`, or a cloud address such as `gs://bucket/folder`) is returned
    as it is and wins over a hub id of the same spelling. Anything of the form `owner/name` is
    otherwise a hub id: its files that match `allow_patterns` are fetched into huggingface_hub's
    cache. Files that are there already are not fetched again, and with `HF_HUB_OFFLINE=1`, or
    without a network, what the cache holds is used.

    Args:
        path: a folder or a hub id.
        allow_patterns: which files are wanted, as shell patterns (`*.safetensors`). Only limits
            what is fetched; an existing folder may hold anything.
        revision: branch, tag or commit of a hub id; None means the default branch.

    Raises:
        FileNotFoundError: no such folder; no such repository or revision on the hub; the hub
            can't be reached and the cache lacks the repository; no file matches the patterns.
        NotADirectoryError: `path` is a file.
        PermissionError: the repository is gated or private; a cloud folder may not be listed.
        ImportError: the package is absent that speaks to a cloud.
        ValueError: `revision` was given for a folder.
    """
    text = os.fspath(path)
    if not text:
        raise FileNotFoundError("The path is empty; expected a folder or a hub id (owner/name).")
    folder = epath.Path(text).expanduser()
    if is_cloud(folder):
        check_folder(folder)
    if is_cloud(folder) or folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} was given, but {text!r} is a folder, and a folder has no "
                "revisions. Leave revision out, or pass a hub id (owner/name)."
            )
        return folder
    if folder.exists():
        raise NotADirectoryError(
            f"{text!r} is a file; expected the folder that holds it, or a hub id (owner/name)."
        )
    if isinstance(path, PurePath | epath.Path) or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(
            f"There is no folder {text!r} (looked from {os.getcwd()!r}), and it is not a hub id, "
            "which is written owner/name."
        )
    return _fetch(text, tuple(allow_patterns), revision)


def checkpoint_folder(path: str | os.PathLike, *, revision: str | None = None) -> epath.Path:
    """The folder of a whole checkpoint, fetched from the Hugging Face hub where need be.

    As `local_folder`. Of a hub repository the files of its top folder are fetched, or, for
    `owner/name/folder`, those of that folder (`meta-llama/Llama-3.2-11B-Vision/original`, an
    adapter's `checkpoint-500`): configuration, processor and safetensors; PyTorch's files only
    where there are no safetensors; all of the folder if it is an Orbax checkpoint.

    Args:
        path: a folder, a hub id, or a hub id and a folder in it.
        revision: branch, tag or commit of a hub id; None means the default branch.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError, ValueError: as `local_folder`; or
            there are no weights of a format that is read.
        OSError: the connection broke off. The next call goes on where it did.
    """
    text = os.fspath(path)
    hub = _HUB_FOLDER.fullmatch(text)
    if not isinstance(path, str) or hub is None or epath.Path(text).exists():
        return local_folder(path, allow_patterns=(), revision=revision)
    hub_id, inside = hub[1], hub[2] or ""
    within = f"{inside}/" if inside else ""

    def fetched(*patterns: str, ignore: tuple[str, ...] = ()) -> epath.Path:
        patterns = tuple(within + pattern for pattern in patterns)
        return _snapshot(hub_id, patterns, revision, ignore, asked=text) / inside

    for kind in _WEIGHTS:
        # On the hub, unlike in a shell, an asterisk stands for folders as well.
        folder = fetched(*COMPANIONS, *kind, ignore=(f"{within}*/*",))
        if any(next(folder.glob(pattern), None) for pattern in kind):
            return folder
    if any(Path(fetched(f"*{_ORBAX_MARK}")).rglob(_ORBAX_MARK)):
        return fetched("*")
    wanted = ", ".join(itertools.chain(*_WEIGHTS))
    raise FileNotFoundError(
        f"The hub repository {_named(hub_id, revision)} has no weights that are read"
        + (f" in its folder {inside!r}" if inside else "")
        + f": neither {wanted} nor an Orbax checkpoint (looked in {os.fspath(folder)!r}). If the "
        "cache holds only a part of it, fetch the rest, where there is a network, with "
        f"`hf download {hub_id}`."
    )


def _fetch(hub_id: str, allow_patterns: tuple[str, ...], revision: str | None) -> epath.Path:
    """Fetches the matching files of one repository; raises if there are none."""
    folder = _snapshot(hub_id, allow_patterns, revision)
    if not any(next(folder.glob(pattern), None) for pattern in allow_patterns):
        raise FileNotFoundError(
            f"The hub repository {_named(hub_id, revision)} has no file that matches "
            f"{', '.join(allow_patterns)} (looked in {os.fspath(folder)!r}). If the cache holds "
            "only a part of it, fetch the rest, where there is a network, with "
            f"`hf download {hub_id}`."
        )
    return folder


def _named(hub_id: str, revision: str | None) -> str:
    return f"{hub_id!r}" + (f" at revision {revision!r}" if revision else "")


def _snapshot(
    hub_id: str,
    allow_patterns: tuple[str, ...],
    revision: str | None,
    ignore: tuple[str, ...] = (),
    asked: str | None = None,
) -> epath.Path:
    """Fetches what matches of one repository; the errors say what a user can do.

    Args:
        asked: what the user gave, if it is more than the hub id.
    """
    # Here and not above: only those who use hub ids wait for this import.
    from huggingface_hub import constants, errors, snapshot_download

    which = _named(hub_id, revision)
    no_folder = f"There is no folder {(asked or hub_id)!r} (looked from {os.getcwd()!r})"
    try:
        found = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(allow_patterns),
            ignore_patterns=list(ignore),
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"The hub repository {which} is gated: ask for access on its page, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"The hub repository {hub_id!r} has no revision {revision!r}; expected a branch, a tag "
            "or a full commit hash."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{no_folder}, and the hub knows no repository {which}. If it is private, log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = (
            "offline mode is on (HF_HUB_OFFLINE)"
            if constants.HF_HUB_OFFLINE
            else (f"the hub at {constants.ENDPOINT} can't be reached")
        )
        raise FileNotFoundError(
            f"{no_folder}, and the hub repository {which} is not in the cache at "
            f"{constants.HF_HUB_CACHE!r} while {why}. Give a folder, or fetch it first, where "
            f"there is a network, with `hf download {hub_id}`."
        ) from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{no_folder}, and it is no valid hub id: {error}") from error
    except OSError as error:
        raise OSError(
            f"Fetching the hub repository {which} broke off: {error}. What has come is kept: call "
            "again, and it goes on from there."
        ) from error
    return epath.Path(found)


def commit_of(folder: str | os.PathLike) -> str | None:
    """The commit of a folder in the hub's cache, or of one within it; None for other folders."""
    for parent, name in itertools.pairwise(epath.Path(folder).parts):
        if parent == "snapshots" and re.fullmatch("[0-9a-f]{40}", name):
            return name
    return None


def published_sha256(file: str | os.PathLike) -> str | None:
    """The SHA-256 that the hub published for a large file of its cache; None for other files."""
    blob = PurePath(os.path.realpath(os.fspath(file)))
    is_hash = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return blob.name if is_hash else None
