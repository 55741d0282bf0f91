"""A training step on eight devices equals that of one, in place; bfloat16 loses nothing small."""

import json
from typing import Any

import numpy as np
import pytest
from processes import results, start

CASES = [
    # mesh, with adapters, parts that arrays are split into: of adapters each has one of the axes
    # that a kernel is split along
    ("data=2,fsdp=2,tensor=2", False, 4),
    ("data=2,fsdp=2,tensor=2", True, 2),
]


@pytest.fixture(scope="module")
def computed() -> dict[str, Any]:
    cases = json.dumps([case[:2] for case in CASES])
    (result,) = results([start("stepping_processes.py", 8, cases)])
    return result.found


@pytest.fixture(params=range(len(CASES)), ids=lambda index: " ".join(map(str, CASES[index])))
def found(computed: dict[str, Any], request: Any) -> dict[str, Any]:
    return computed["meshes"][request.param] | {"parts": CASES[request.param][2]}


def test_equals_one_device(found: dict[str, Any]):
    np.testing.assert_allclose(found["metrics"], found["expected"]["metrics"], rtol=1e-5)
    assert found["errors"]["params"] < 3e-5  # after steps of up to 1e-2
    assert found["errors"]["moments"] < 3e-5


def test_state_stays_where_it_is(found: dict[str, Any]):
    """Every array has the same memory and places before and after a step."""
    assert found["moved"] == []
    assert found["taken over"] >= found["held"]


def test_state_is_split(found: dict[str, Any]):
    """All but norms, gates and biases, and what has no axis for all of the mesh's."""
    assert found["whole"] == found["expected"]["held"]
    assert 1 <= found["held"] * found["parts"] / found["whole"] < 1.25


def test_small_updates_and_sums_over_pictures_are_float32(computed: dict[str, Any]):
    """Adam's first step is its learning rate, far below what bfloat16 tells apart."""
    found = computed["bfloat16"]
    np.testing.assert_allclose(found["changes"], 1e-6, rtol=0.2)
    assert found["gradients"] < 1e-4
