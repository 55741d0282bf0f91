"""What the engine has done, in numbers."""

import dataclasses
from dataclasses import dataclass

__all__ = ["EngineStats"]


@dataclass(frozen=True)
class EngineStats:
    """What the engine has done so far.

    Attributes:
        done, failed: requests.
        tokens_in, tokens_out: of prompts that were read, and of answers.
        slots_busy, num_slots: now.
        pictures_encoded, pictures_reused: distinct pictures, and those that were found kept.
        programs: compiled so far.
    """

    done: int
    failed: int
    tokens_in: int
    tokens_out: int
    slots_busy: int
    num_slots: int
    pictures_encoded: int
    pictures_reused: int
    programs: int

    def since(self, earlier: "EngineStats") -> "EngineStats":
        """What was done since then; slots and programs as they are now."""
        counters = (
            *("done", "failed", "tokens_in", "tokens_out"),
            *("pictures_encoded", "pictures_reused"),
        )
        more = {name: getattr(self, name) - getattr(earlier, name) for name in counters}
        return dataclasses.replace(self, **more)
