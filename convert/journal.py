"""What an unfinished conversion has done so far, so that the same command goes on from there."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

JOURNAL_NAME = "conversion.incomplete"


class Journal:
    """A file of JSON lines in the result's folder: first the plan, then what is finished.

    A line that a killed process left half-written is ignored. The file goes when the conversion is
    finished, so a folder that has one is not.
    """

    def __init__(self, folder: Path):
        self.path = folder / JOURNAL_NAME

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The plan (None if there is no journal) and the entries."""
        if not self.path.exists():
            return None, []
        lines = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return (lines[0], lines[1:]) if lines else (None, [])

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Writes a journal with a plan alone."""
        unfinished = self.path.with_name(f"{JOURNAL_NAME}.new")
        unfinished.write_text(json.dumps(plan) + "\n")
        _sync(unfinished)
        unfinished.replace(self.path)

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends entries; they are on disk when this returns."""
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        if text:
            with self.path.open("a") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())

    def is_alone(self) -> bool:
        """Whether the folder holds nothing, or a journal that was being begun."""
        return all(path.name.startswith(JOURNAL_NAME) for path in self.path.parent.iterdir())

    def remove(self) -> None:
        for name in (f"{JOURNAL_NAME}.new", JOURNAL_NAME):
            self.path.with_name(name).unlink(missing_ok=True)


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
