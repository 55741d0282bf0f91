"""What `verify` says of two checkpoints: the same, close, different, or not comparable."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoint import arrays, random_params, save_tensors, tiny_config

from mllama_jax.cli import main
from mllama_jax.convert import CheckpointError, save_params
from mllama_jax.convert.differences import Difference, Tolerance, difference_of
from mllama_jax.convert.table import LAYOUTS, spelled
from mllama_jax.convert.values import Values
from mllama_jax.convert.verification import pair, verify

LM = "language_model."
UP = f"{LM}model.layers.2.mlp.up_proj.weight"
NORM = f"{LM}model.norm.weight"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A whole float32 model in one file."""
    folder = tmp_path_factory.mktemp("original")
    config = tiny_config()
    save_params(random_params(config), config, folder, "model")
    return folder


@pytest.fixture
def changed(original, tmp_path) -> Callable[..., Path]:
    """Makes a folder like the original with other tensors."""

    def changed(change: Callable[[Tensors], Tensors | None], name: str = "changed") -> Path:
        values = {name: array.copy() for name, array in arrays(original).items()}
        folder = tmp_path / name
        save_tensors(change(values) or values, original, folder)
        return folder

    return changed


@pytest.fixture
def both(changed) -> Callable[..., tuple[Path, Path]]:
    """Two folders whose final norms hold the given numbers in float32, all else alike."""

    def both(a: np.ndarray, b: np.ndarray) -> tuple[Path, Path]:
        def with_norm(values: np.ndarray) -> Callable[[Tensors], None]:
            norm = np.ones(24, np.float32)
            norm[5 : 5 + len(values)] = values
            return lambda t: t.update({NORM: norm})

        return changed(with_norm(a), "a"), changed(with_norm(b), "b")

    return both


def cast(dtype: type) -> Callable[[Tensors], Tensors]:
    return lambda t: {name: array.astype(dtype) for name, array in t.items()}


def test_the_same_in_other_files_and_under_other_names(original, changed, tmp_path):
    config = tiny_config()
    save_params(random_params(config), config, tmp_path / "b", "model", max_shard_size="50KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    newer = list(LAYOUTS)[1]
    renamed = changed(lambda t: {spelled(name, newer): array for name, array in t.items()})
    for other in (original, tmp_path / "b", renamed):
        read: list[int] = []
        found = verify(original, other, progress=read.append)
        assert found.equal
        assert len(found.tensors) == len(arrays(original))
        assert (found.differing, found.config_differences, found.notes) == ((), (), ())
        assert all(tensor.difference == Difference() for tensor in found.tensors)
        assert sum(read) == pair(original, other).num_bytes
        assert sum(read) == 2 * sum(array.nbytes for array in arrays(original).values())


def test_one_bit(original, changed):
    def change(t: Tensors) -> None:
        t[UP].view(np.uint32)[7, 3] ^= 1

    found = verify(original, changed(change))
    assert not found.equal
    (tensor,) = found.differing
    before = arrays(original)[UP]
    gap = abs(float(np.spacing(before[7, 3])))
    assert (tensor.name, tensor.difference.count) == (UP, 1)
    assert tensor.difference.max_abs == pytest.approx(gap, rel=1e-6)
    assert tensor.difference.max_abs_index == tensor.difference.max_rel_index == (7, 3)
    assert tensor.difference.max_rel == pytest.approx(gap / abs(before[7, 3]), rel=1e-6)


def test_the_worst_comes_first(original, changed):
    def change(t: Tensors) -> None:
        t[UP][1, 2] += 0.5
        t[NORM][3] += 2
        t["vision_model.class_embedding"][4] -= 1

    found = verify(original, changed(change), atol=0.75)
    assert [tensor.name for tensor in found.differing] == [NORM, "vision_model.class_embedding"]
    assert [tensor.difference.count for tensor in found.differing] == [1, 1]
    assert verify(original, changed(change), atol=2.001).equal


NAN, OTHER_NAN = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("a", "b", "same_bits", "same_numbers"),
    [
        (0.0, -0.0, False, True),
        (NAN, NAN, True, True),
        (NAN, OTHER_NAN, False, True),
        (NAN, 1.0, False, False),
        (1.0, NAN, False, False),
        (np.inf, np.inf, True, True),
        (np.inf, -np.inf, False, False),
        (1.0, np.inf, False, False),
        (np.inf, 1.0, False, False),
        (0.0, 1e-45, False, False),
    ],
)
def test_numbers_that_are_special(both, a, b, same_bits, same_numbers):
    folders = both(np.array([a], np.float32), np.array([b], np.float32))
    assert verify(*folders).equal == same_bits
    assert verify(*folders, atol=0).equal == same_numbers
    assert verify(*folders, rtol=0).equal == same_numbers
    if not (math.isfinite(a) and math.isfinite(b)):
        found = verify(*folders, atol=1e30, rtol=1e30)
        assert found.equal == same_numbers
        (tensor,) = [tensor for tensor in found.tensors if tensor.name == NORM]
        assert tensor.difference.max_abs == (0 if same_numbers else math.inf)
        assert tensor.values_a == Values(math.isnan(a), math.isinf(a), 1)
        assert tensor.values_b == Values(math.isnan(b), math.isinf(b), 1)


@pytest.mark.parametrize("rtol", [0, 0.25])
@pytest.mark.parametrize("atol", [0, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_closeness_is_numpys(dtype, atol, rtol):
    rng = np.random.default_rng(0)
    odd = [0, -0.0, 1, -1, 1.25, 0.75, np.nan, np.inf, -np.inf, 1e-7, 3e4, -3e4]
    a, b = (rng.choice(odd, size=(300, 700)).astype(dtype) for _ in range(2))
    region = (slice(5, 305), slice(0, 700))
    found = difference_of(a, b, region, Tolerance(atol, rtol))
    a, b = a.astype(np.float64), b.astype(np.float64)
    close = np.isclose(a, b, rtol, atol, equal_nan=True)
    assert found.count == (~close).sum() > 0
    assert found.max_abs == np.inf
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    found = difference_of(a.astype(dtype), b.astype(dtype), region, None)
    assert found.max_abs == np.abs(a - b).max()
    row, column = found.max_abs_index
    assert abs(a - b)[row - 5, column] == found.max_abs


def test_indices_are_those_of_the_whole_tensor(changed):
    """A tensor of several blocks, more than 16 MiB each way, with one difference late in it."""
    a = np.random.default_rng(0).normal(size=(2600, 4000)).astype(np.float32)
    b = a.copy()
    b[2599, 3998] = 9
    b[1300, 1] = np.nan

    def folder(name: str, values: np.ndarray) -> Path:
        return changed(lambda t: {"unknown.weight": values, NORM: t[NORM]}, name)

    found = verify(folder("a", a), folder("b", b), workers=2)
    (tensor,) = found.differing
    assert tensor.name == "unknown.weight"
    assert tensor.difference.count == 2
    assert tensor.difference.max_abs_index == (1300, 1)
    found = verify(folder("a", np.where(np.isnan(b), np.float32(0), a)), folder("b", b), atol=5)
    assert found.differing[0].values_b.nans == 1


def test_dtypes(original, changed):
    rounded = changed(cast(ml_dtypes.bfloat16), "rounded")
    found = verify(original, rounded)
    assert len(found.differing) == len(found.tensors)
    assert {(t.dtype_a, t.dtype_b) for t in found.tensors} == {("float32", "bfloat16")}
    assert verify(original, rounded, rtol=2**-8).equal
    assert not verify(original, rounded, rtol=2**-10).equal

    def widened(_: Tensors) -> Tensors:
        return {name: array.astype(np.float32) for name, array in arrays(rounded).items()}

    assert verify(rounded, changed(widened), atol=0).equal
    found = verify(rounded, changed(widened))
    assert not found.equal
    assert {tensor.difference.count for tensor in found.differing} == {0}


def test_tensors_that_can_not_be_compared(original, changed):
    def change(t: Tensors) -> None:
        t["extra"] = t.pop(UP)
        t[NORM] = np.ones(7, np.float32)

    found = verify(original, changed(change))
    assert not found.equal
    assert (found.only_in_a, found.only_in_b) == ((UP,), ("extra",))
    assert found.misshaped == ((NORM, (24,), (7,)),)
    assert found.differing == ()
    assert len(found.tensors) == len(arrays(original)) - 2


@pytest.mark.parametrize("component", ["language_model", "text_model", "vision_model"])
def test_a_part_is_compared_with_the_same_part_of_a_whole(original, tmp_path, component):
    config = tiny_config()
    whole = random_params(config)
    part = whole["vision_model" if component == "vision_model" else "language_model"]
    part = part["model"] if component == "text_model" else part
    save_params(part, config, tmp_path, component)
    for a, b, which in ((original, tmp_path, "A"), (tmp_path, original, "B")):
        found = verify(a, b)
        assert (found.equal, found.component) == (True, component)
        assert len(found.tensors) == len(arrays(tmp_path)) < len(arrays(original))
        (note,) = found.notes
        assert note.startswith(f"{which} holds more, MllamaForConditionalGeneration; only ")


def test_parts_with_nothing_in_common(run, tmp_path):
    config = tiny_config()
    folders = tmp_path / "vision", tmp_path / "text"
    for folder, component in zip(folders, ("vision_model", "text_model"), strict=True):
        save_params(random_params(config, component), config, folder, component)
    with pytest.raises(ValueError, match="nothing to compare"):
        verify(*folders)
    status, printed, complaint = run(*folders)
    assert (status, printed) == (2, "")
    assert complaint.startswith("mllama-jax: nothing to compare")


def test_a_tensor_stored_twice_is_refused(original, changed):
    folder = changed(lambda t: t.update({"model.language_model.norm.weight": t[NORM]}))
    with pytest.raises(CheckpointError, match="stored twice"):
        verify(original, folder)


def test_configurations_are_compared_for_information(original, changed):
    folder = changed(lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_theta"] = 123.0
    (folder / "config.json").write_text(json.dumps(config))
    found = verify(original, folder)
    assert found.equal
    assert found.config_differences == ("text_config.rope_theta: 500000.0 in A, 123.0 in B",)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_tolerances_that_are_none(original, value):
    for name in ("atol", "rtol"):
        with pytest.raises(ValueError, match=f"{name}="):
            verify(original, original, **{name: value})


def test_workers(original):
    assert verify(original, original, workers=1).equal
    with pytest.raises(ValueError, match="workers=0: expected at least 1"):
        verify(original, original, workers=0)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``mllama-jax verify`` in this process: status, what it printed, what it complained."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mllama-jax", "verify", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_the_report_and_the_status(run, original, changed):
    status, printed, _ = run(original, original)
    assert status == 0
    assert f"Equal: all {len(arrays(original))} tensors have the same dtype" in printed

    def change(t: Tensors) -> None:
        t[UP][1, 2] = np.nan
        for layer in (0, 2, 3):
            t[UP.replace("2", str(layer))][0, 0] += 0.5
        del t[NORM]

    folder = changed(change)
    status, printed, _ = run(original, folder)
    assert status == 1
    assert "Different: 3 of " in printed
    assert f"only in A (1):\n  {NORM}" in printed
    assert f"{UP}: 1 NaN in B" in printed
    lines = printed.split("the largest differences:\n")[1].splitlines()
    assert lines[1].split()[:4] == [UP, "2", f"{42 * 24:,}", "inf"]
    assert "[1, 2]" in lines[1]
    assert lines[2].split()[4:6] == ["[0,", "0]"]
    status, printed, _ = run(original, folder, "--json")
    found = json.loads(printed)
    assert (status, found["equal"], found["differing"]) == (1, False, 3)
    assert {tensor["name"] for tensor in found["tensors"]} == {
        UP.replace("2", str(layer)) for layer in (0, 2, 3)
    }


def test_what_is_within_the_tolerance_is_reported_too(run, original, changed):
    folder = changed(lambda t: t.update({NORM: t[NORM] + 0.25}))
    status, printed, _ = run(original, folder, "--atol", "0.5")
    assert status == 0
    assert "differ by no more than 0.5 + 0 * |B|" in printed
    assert NORM in printed.split("the largest differences:\n")[1]


def test_a_checkpoint_that_can_not_be_read(run, original, tmp_path):
    status, printed, complaint = run(original, tmp_path / "absent")
    assert (status, printed) == (2, "")
    assert "mllama-jax: There is no folder" in complaint
    assert run(original, original, "--atol", "-1")[0] == 2
