"""From a path or a Hugging Face hub id to a folder that can be read."""

import os
import re
from collections.abc import Sequence
from pathlib import PurePath

from etils import epath

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


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
        PermissionError: the repository is gated or private.
        ValueError: `revision` was given for a folder.
    """
    text = os.fspath(path)
    if not text:
        raise FileNotFoundError("The path is empty; expected a folder or a hub id (owner/name).")
    folder = epath.Path(text).expanduser()
    if folder.is_dir():
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


def _fetch(hub_id: str, allow_patterns: tuple[str, ...], revision: str | None) -> epath.Path:
    """Fetches the matching files of one repository; the errors say what a user can do."""
    # Here and not above: only those who use hub ids wait for this import.
    from huggingface_hub import constants, errors, snapshot_download

    which = f"{hub_id!r}" + (f" at revision {revision!r}" if revision else "")
    no_folder = f"There is no folder {hub_id!r} (looked from {os.getcwd()!r})"
    try:
        found = snapshot_download(hub_id, revision=revision, allow_patterns=list(allow_patterns))
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
    folder = epath.Path(found)
    if not any(next(folder.glob(pattern), None) for pattern in allow_patterns):
        raise FileNotFoundError(
            f"The hub repository {which} has no file that matches {', '.join(allow_patterns)} "
            f"(looked in {os.fspath(folder)!r}). If the cache holds only a part of it, fetch the "
            f"rest, where there is a network, with `hf download {hub_id}`."
        )
    return folder
