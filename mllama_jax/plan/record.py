"""What a plan says: frozen dataclasses that become JSON and come back."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from mllama_jax.plan.job import Job

Source = Literal["compiler", "shapes", "formula", "estimate"]
SOURCES: Mapping[Source, str] = {
    "compiler": "measured: the compiler's own figure for the compiled program",
    "shapes": "counted: exact, from shapes, dtypes and how each array is split",
    "formula": "counted: exact, from the model's formula",
    "estimate": "estimated: from sizes and the chip's data sheet, not measured",
}
"""Where a figure comes from."""

GIB = 2**30


@dataclass(frozen=True)
class Amount:
    """So many bytes on each chip, of one kind."""

    kind: str
    bytes: int
    source: Source


@dataclass(frozen=True)
class Memory:
    """What a program takes of each chip's memory.

    Attributes:
        usable: bytes that the compiler gives to programs.
        amounts: by kind; their sum is what the program needs.
    """

    usable: int
    amounts: tuple[Amount, ...]

    @property
    def needed(self) -> int:
        return sum(amount.bytes for amount in self.amounts)

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    @property
    def complete(self) -> bool:
        """Whether everything is in it; otherwise it is what is needed at least."""
        return any(amount.source == "compiler" for amount in self.amounts)


@dataclass(frozen=True)
class Buffer:
    """One of the largest arrays on each chip.

    Attributes:
        name: a parameter's path, or what the array is for.
        type: dtype and shape of a chip's part, such as ``bf16[8,1601]``.
    """

    name: str
    type: str
    bytes: int
    source: Source


@dataclass(frozen=True)
class Work:
    """Operations of one step on all chips together, of one part of the model."""

    part: str
    flops: float


@dataclass(frozen=True)
class Term:
    """A lower bound on the time of one part of a step.

    Attributes:
        resource: what it is that the part waits for, such as "compute" or "network".
    """

    part: str
    resource: str
    seconds: float
    source: Source


@dataclass(frozen=True)
class Bound:
    """A lower bound on the time of a step: hardware takes longer.

    Attributes:
        seconds: of a step; for decoding, of one token of every row.
        terms: by part and resource.
        binds: the resource that makes the bound.
        mfu: an upper bound on the model-FLOPs utilisation, 0 to 1; None where the compiler
            estimates no cycles, so that nothing bounds it.
    """

    seconds: float
    terms: tuple[Term, ...]
    binds: str
    mfu: float | None


@dataclass(frozen=True)
class Rate:
    """An upper bound on what the job does, such as tokens a second."""

    unit: str
    value: float


@dataclass(frozen=True)
class Plan:
    """The answer to a `Job`.

    Attributes:
        job: what was planned, every default filled in.
        chip: the kind of device, by the name that people use.
        chips: how many there are.
        mesh: a line for people about how they are used.
        memory: of each chip.
        buffers: the largest arrays, first the largest.
        work: operations of a step by the model's formula.
        bound: on the step's time; None where nothing was compiled.
        rates: that follow from it.
        advice: what to change where the job does not fit.
        notes: what the figures leave out.
        compile_seconds: None where nothing was compiled.
        versions: of what decides the figures.
    """

    job: Job
    chip: str
    chips: int
    mesh: str
    memory: Memory
    buffers: tuple[Buffer, ...]
    work: tuple[Work, ...]
    bound: Bound | None
    rates: tuple[Rate, ...]
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    compile_seconds: float | None
    versions: Mapping[str, str]

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def flops(self) -> float:
        """Of a step, on all chips together."""
        return sum(work.flops for work in self.work)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`, with the verdict beside the figures."""
        verdict = {"fits": self.fits, "needed_bytes": self.memory.needed, "flops": self.flops}
        return {**verdict, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` was made of.

        Raises:
            ValueError: a field is missing or unknown, as in a file of another version.
        """
        try:
            return cls._read({k: v for k, v in values.items() if k not in _DERIVED})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a plan that this version wrote: {error}") from error

    @classmethod
    def _read(cls, values: dict[str, Any]) -> Self:
        memory = values["memory"]
        amounts = tuple(Amount(**amount) for amount in memory["amounts"])
        bound = values["bound"]
        if bound is not None:
            bound = Bound(**{**bound, "terms": tuple(Term(**term) for term in bound["terms"])})
        nested = {
            "job": Job(**values["job"]),
            "memory": Memory(**{**memory, "amounts": amounts}),
            "buffers": tuple(Buffer(**buffer) for buffer in values["buffers"]),
            "work": tuple(Work(**work) for work in values["work"]),
            "bound": bound,
            "rates": tuple(Rate(**rate) for rate in values["rates"]),
            "advice": tuple(values["advice"]),
            "notes": tuple(values["notes"]),
        }
        return cls(**{**values, **nested})


_DERIVED = ("fits", "needed_bytes", "flops")


def to_text(plans: list[Plan]) -> str:
    """One plan a line, so that files of plans can be compared line by line."""
    return "".join(json.dumps(plan.to_json(), sort_keys=True) + "\n" for plan in plans)


def from_text(text: str) -> list[Plan]:
    """What `to_text` wrote."""
    return [Plan.from_json(json.loads(line)) for line in text.splitlines() if line.strip()]
