"""The engine on meshes of eight devices answers as on one."""

from typing import Any

import pytest
from processes import results, start

MESHES = ("", "data=2,fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    ((found, _),) = results([start("answering_processes.py", 8, *MESHES)])
    return found


def test_answers_are_those_of_one_device(found):
    one_device, on_mesh = (found[mesh]["tokens"] for mesh in MESHES)
    assert len(one_device) == 16
    assert on_mesh == one_device


@pytest.mark.parametrize("mesh", MESHES)
def test_slots_take_the_memory_that_is_predicted(found, mesh):
    assert found[mesh]["held"] == found[mesh]["predicted"]


def test_slots_are_split(found):
    # Four slots over the axes of the batch, heads over tensor; the rest is on all devices.
    assert found[MESHES[1]]["held"] < found[""]["held"] / 3


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_is_compiled_after_warm_up(found, mesh):
    assert found[mesh]["compiled"] == 0
