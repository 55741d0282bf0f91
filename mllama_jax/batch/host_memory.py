"""What memory the system can still give this process, on a machine of its own or in a container."""

from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["available_memory"]

_LEAST_UNLIMITED = 2**60
"""Version 1 of control groups has no word for "no limit", but a number near 2**63."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping: what is free and what the kernel would give up, such
    as cached files; no more than the control groups of this process allow.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    return max(0, min((int(psutil.virtual_memory().available), *_left_in_groups(root))))


def _left_in_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _left(mounts, path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left(mounts / "memory", path, *names)


def _left(mount: Path, path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    """What each group from this one up to the mount has left. In a container the path may be that
    outside, of which only the mount is seen."""
    group = mount / path.strip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(mount):
            return
        try:
            most = (folder / limit).read_text().strip()
            used = int((folder / usage).read_text())
            stat = (folder / "memory.stat").read_text().split()
        except OSError:
            continue
        if most == "max" or int(most) >= _LEAST_UNLIMITED:
            continue
        # Cached files count as used, and are given up when memory is short.
        yield int(most) - used + int(dict(zip(stat[::2], stat[1::2], strict=True)).get(cached, 0))
