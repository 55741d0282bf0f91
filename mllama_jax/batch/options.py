"""The sizes that the engine's programs are compiled for."""

from dataclasses import dataclass

__all__ = ["EngineOptions"]

_POSITIVE = (
    "num_slots",
    "max_length",
    "max_tiles",
    "decode_steps",
    "num_workers",
    "read_ahead_bytes",
)


@dataclass(frozen=True)
class EngineOptions:
    """Sizes, which are what programs are compiled for.

    Attributes:
        num_slots: requests that are answered at the same time.
        max_length: tokens of a request, prompt and answer together.
        max_tiles: tiles of all pictures of a request together.
        prompt_lengths: a prompt is filled up to one of them; longer ones are read in chunks of the
            largest.
        tile_counts: what a prompt with pictures looks at is filled up to one of them; the last is
            ``max_tiles``.
        pictures_at_once: batches of the vision encoder.
        decode_steps: new tokens between two looks of the host.
        pictures_kept: encoded pictures that are kept for further requests.
        num_workers: threads that prepare requests.
        read_ahead_bytes: once the pictures of requests that wait for a slot hold as many, no
            further request is prepared.
    """

    num_slots: int = 8
    max_length: int = 2048
    max_tiles: int = 4
    prompt_lengths: tuple[int, ...] = (64, 128, 256, 512)
    tile_counts: tuple[int, ...] = (4,)
    pictures_at_once: tuple[int, ...] = (1, 4)
    decode_steps: int = 16
    pictures_kept: int = 32
    num_workers: int = 2
    read_ahead_bytes: int = 2**30

    @property
    def cache_length(self) -> int:
        """Tokens that a slot has room for: whole chunks of the largest of ``prompt_lengths``."""
        return -(-self.max_length // self.prompt_lengths[-1]) * self.prompt_lengths[-1]

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} is not sorted in rising order, from 1 on"
            for name in ("prompt_lengths", "tile_counts", "pictures_at_once")
            if not _is_rising(getattr(self, name))
        ]
        problems += [
            f"{name}={getattr(self, name)} is not a positive integer"
            for name in _POSITIVE
            if getattr(self, name) < 1
        ]
        if not problems and self.tile_counts[-1] != self.max_tiles:
            problems.append(
                f"the last of tile_counts={self.tile_counts} is not max_tiles={self.max_tiles}"
            )
        if problems:
            raise ValueError("; ".join(problems))


def _is_rising(sizes: tuple[int, ...]) -> bool:
    return bool(sizes) and sizes[0] >= 1 and list(sizes) == sorted(set(sizes))
