"""From lists of token ids to rectangles: what to cut, where to pad, and which arrays come out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from mllama_jax.processing.batch_feature import BatchFeature

NO_LIMIT = int(1e30)
"""The length limit that tokenizer files state when there is none."""

_NO_LIMIT_FROM = int(1e20)
_PADDING = {
    True: "longest",
    "longest": "longest",
    "max_length": "max_length",
    False: None,
    None: None,
    "do_not_pad": None,
    # The side alone, as the published example of the processor has it.
    "left": "longest",
    "right": "longest",
}
_TRUNCATION = {
    True: True,
    "longest_first": True,
    "only_first": True,
    False: False,
    "do_not_truncate": False,
}


@dataclass(frozen=True)
class Lengths:
    """What to do about the lengths of the rows of a batch.

    Attributes:
        cut_to: rows are cut to this many tokens; None: not.
        pad_to: "longest", a number of tokens, or None: rows are not padded.
        multiple_of: the padded length is rounded up to a multiple of this.
        side: "left" or "right", where padding goes.
    """

    cut_to: int | None
    pad_to: str | int | None
    multiple_of: int
    side: str

    @classmethod
    def from_options(
        cls,
        padding: bool | str | None,
        truncation: bool | str | None,
        max_length: int | None,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
        *,
        default_side: str,
        limit: int,
    ) -> "Lengths":
        """Reads the options of `MllamaTokenizer.__call__`; see there.

        Args:
            default_side: what `padding_side=None` means.
            limit: what `max_length=None` means; from 1e20 on there is no limit.

        Raises:
            ValueError: an option has no such value, or two contradict each other.

        Source: transformers 4.54.1, tokenization_utils_base.py: _get_padding_truncation_strategies.
        """
        if truncation is None:
            truncation = max_length is not None and padding in (False, None, "do_not_pad")
        pad_to = _choice("padding", padding, _PADDING)
        cuts = _choice("truncation", truncation, _TRUNCATION)
        named_side = padding if padding in ("left", "right") else None
        if named_side and padding_side and named_side != padding_side:
            raise ValueError(f"padding={padding!r} and padding_side={padding_side!r} disagree.")
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}; expected a number of tokens from 1 on.")
        multiple = pad_to_multiple_of or 1
        if pad_to and cuts and max_length and max_length % multiple:
            raise ValueError(
                f"Cutting to max_length={max_length} and padding to a multiple of {multiple} "
                "contradict each other. Choose a max_length that is a multiple."
            )
        length = max_length or (limit if limit < _NO_LIMIT_FROM else None)
        return cls(
            cut_to=length if cuts else None,
            pad_to=length if pad_to == "max_length" else pad_to,
            multiple_of=multiple,
            side=check_side(named_side or padding_side or default_side),
        )

    def pad(
        self, rows: Sequence[Sequence[int]], pad_id: int | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The rows padded with `pad_id`, and their masks: 1 for a token, 0 for padding.

        Raises:
            ValueError: `pad_id` is needed and None.
        """
        ones = [[1] * len(row) for row in rows]
        if self.pad_to is None:
            return [list(row) for row in rows], ones
        if pad_id is None:
            raise ValueError(
                "Padding is asked for, but the tokenizer has no padding token. Give it one with "
                'from_pretrained(…, pad_token="…"), or encode texts one at a time.'
            )
        longest = max(map(len, rows), default=0)
        length = longest if isinstance(self.pad_to, str) else self.pad_to
        length = -(-length // self.multiple_of) * self.multiple_of
        return self._fill(rows, length, pad_id), self._fill(ones, length, 0)

    def _fill(self, rows: Sequence[Sequence[int]], length: int, value: int) -> list[list[int]]:
        gaps = [[value] * (length - len(row)) for row in rows]
        if self.side == "left":
            return [[*gap, *row] for gap, row in zip(gaps, rows, strict=True)]
        return [[*row, *gap] for gap, row in zip(gaps, rows, strict=True)]


def check_side(side: str) -> str:
    """`side`, if it is one.

    Raises:
        ValueError: neither "left" nor "right".
    """
    if side not in ("left", "right"):
        raise ValueError(f"A side to pad or cut is {side!r}; expected 'left' or 'right'.")
    return side


def _choice(name: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    if not isinstance(value, bool | str | None) or value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {list(choices)}.")
    return choices[value]


def as_arrays(fields: Mapping[str, Any], return_tensors: str | None) -> BatchFeature:
    """The fields as they are (None), as numpy arrays ("np") or as JAX arrays ("jax").

    Integers become int64 in numpy and int32 in JAX, other numbers float32.

    Raises:
        ValueError: no such kind, or rows of different length.
    """
    if return_tensors is None:
        return BatchFeature(fields)
    if return_tensors not in ("np", "jax"):
        raise ValueError(
            f"return_tensors={return_tensors!r}; expected None, 'np' (numpy) or 'jax'."
        )
    ids = fields.get("input_ids")
    lengths = [len(row) for row in ids] if ids is not None else []
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The texts have {lengths} tokens, which is no rectangular array. Pass padding=True."
        )
    arrays: dict[str, Any] = {}
    for name, values in fields.items():
        array: Any = np.asarray(values)
        integer = np.issubdtype(array.dtype, np.integer) or array.size == 0
        array = array.astype(np.int64 if integer else np.float32, copy=False)
        if return_tensors == "jax":
            array = jnp.asarray(array, jnp.int32 if integer else jnp.float32)
        arrays[name] = array
    return BatchFeature(arrays)


def as_ids(sequence: Any) -> list[int]:
    """A flat list of Python integers from a list or array of ids.

    Raises:
        ValueError: not one sequence of ids from 0 on.
    """
    ids = np.asarray(sequence)
    if ids.ndim != 1:
        raise ValueError(
            f"Expected one sequence of token ids, found an array of shape {ids.shape}. For a batch "
            "of sequences there is batch_decode."
        )
    if ids.size and (not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0):
        raise ValueError(
            f"Token ids are integers from 0 on; found {ids.dtype} from {ids.min()} on. Labels "
            "that are masked with -100 have to be left out."
        )
    return ids.tolist()
