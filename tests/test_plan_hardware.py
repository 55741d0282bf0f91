"""Chips, slices of them, and the bound that follows from what a program does on them."""

import math

import pytest
from jax.sharding import AxisType

from mllama_jax.attention.costs import KernelCost
from mllama_jax.plan.bounds import (
    by_resource,
    kernel_seconds,
    time_bound,
    uncosted,
    without_overlap,
)
from mllama_jax.plan.collectives import Collective, network_seconds
from mllama_jax.plan.hardware import CHIPS
from mllama_jax.plan.hlo import Cycles, KernelCall, ProgramCost
from mllama_jax.plan.topology import SHAPES, parse_topology

TPU_SLICES = [
    f"{chip}:{shape}" for chip in SHAPES if not CHIPS[chip].is_gpu for shape in SHAPES[chip][:5]
]


@pytest.mark.parametrize("name", TPU_SLICES)
def test_the_compiler_has_every_slice(name: str) -> None:
    topology = parse_topology(name)
    devices = topology.devices()
    assert topology.name == name
    assert len(devices) == topology.num_devices
    assert len({tuple(device.coords) for device in devices}) == topology.num_chips
    assert max(tuple(device.coords) for device in devices)[: len(topology.shape)] == tuple(
        size - 1 for size in topology.shape
    )


def test_slices_are_joined_along_data() -> None:
    topology = parse_topology(" V5e:4x2×2 ")
    assert (topology.name, topology.shape, topology.slices) == ("v5e:2x4*2", (2, 4), 2)
    assert topology.num_chips == 16
    mesh = topology.mesh("data=4,fsdp=4")
    assert mesh.axis_types == (AxisType.Auto,) * 2
    by_data = [{d.slice_index for d in mesh.devices[place].flat} for place in range(4)]
    assert by_data == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="only the axis data may go over the slow network"):
        topology.mesh("fsdp=16")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e", "not of the form chip:shape"),
        ("v9:4x4", r"unknown chip; expected one of\n(.*\n)*  v4: 2x2x1"),
        ("v5e:3x4", "v5e has no slice 3x4; expected one of v5e:1x1, v5e:2x2"),
        ("v5p:4x4", "v5p has no slice 4x4; expected one of v5p:2x2x1"),
        ("v5e:4x4*0", "expected 1 to 64 slices"),
        ("h100:3", "h100 has no slice 3; expected one of h100:1, h100:2"),
        ("h100:8*2", "expected the GPUs of one host, such as h100:8"),
    ],
)
def test_unknown_topologies_are_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_topology(name)


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mllama-jax\[plan\]"):
        parse_topology("v5e:2x2").devices()
    with pytest.raises(ImportError, match=r"mllama-jax\[cuda\]"):
        parse_topology("h100:8").devices()


def test_rings_and_lines() -> None:
    assert [parse_topology("v5e:8x16").closed(dim) for dim in (0, 1)] == [False, True]
    assert [parse_topology("v5p:2x4x4").closed(dim) for dim in (0, 1, 2)] == [False, True, True]


def test_figures_of_chips_agree() -> None:
    for chip in CHIPS.values():
        assert chip.usable_bytes <= chip.memory_bytes
        if chip.torus_dims:
            per_cycle = chip.peak_flops / chip.clock / (2 * 128 * 128)
            assert per_cycle == pytest.approx(round(per_cycle), rel=0.01)
            assert math.log2(round(per_cycle)).is_integer()


def program(overlaps: bool) -> ProgramCost:
    """On one v5e: 0.3 s of products, 0.2 s of copies; a kernel; an exchange of 1 GB."""
    return ProgramCost(
        cycles=(
            Cycles("decoder MLPs", "products", "forward", 0.3 * 1.5e9, in_open_loop=True),
            Cycles("copies", "copies", "forward", 0.2 * 1.5e9, in_open_loop=False),
        ),
        collectives=(Collective("all-gather", 10**9, tuple(range(4)), overlaps=overlaps, runs=20),),
        kernels=(
            KernelCall("known", "vision encoder", "forward", (), (), 5, in_open_loop=True),
            KernelCall("unknown", "vision encoder", "forward", (), (), 5, in_open_loop=False),
        ),
    )


def costs(call: KernelCall) -> KernelCost | None:
    return KernelCost(197e12 * 0.02, 1.0) if call.name == "known" else None


def test_what_overlaps_is_not_added() -> None:
    topology = parse_topology("v5e:2x2")
    mesh = topology.mesh("fsdp=4")
    given = {"model_flops": 4 * 197e12 * 0.15, "bytes_read": 819e9 * 0.05, "cost_of_kernel": costs}
    network = 20 * 0.75 * 1e9 / (2 * 50e9)
    ahead = time_bound(program(overlaps=True), topology, mesh, **given)
    assert by_resource(ahead.terms) == pytest.approx(
        {"compute": 0.5, "attention kernels": 0.1, "network over fsdp": network, "memory": 0.05}
    )
    assert ahead.seconds == pytest.approx(0.6)
    assert ahead.binds == "compute"
    assert ahead.mfu == pytest.approx(0.25)
    assert without_overlap(ahead.terms) == pytest.approx(0.6 + network)
    waited = time_bound(program(overlaps=False), topology, mesh, **given)
    assert waited.seconds == pytest.approx(0.6 + network)
    assert uncosted(program(overlaps=True), costs) == ("unknown",)


def test_sources_of_figures() -> None:
    topology = parse_topology("v5e:2x2")
    given = {"model_flops": 1e12, "bytes_read": 819e9 * 2, "cost_of_kernel": costs}
    mesh = topology.mesh("fsdp=4")
    bound = time_bound(program(overlaps=True), topology, mesh, **given)
    assert {term.resource: term.source for term in bound.terms} == {
        "compute": "compiler",
        "attention kernels": "estimate",
        "network over fsdp": "estimate",
        "memory": "estimate",
    }
    assert (bound.binds, bound.seconds) == ("memory", 2)


def test_a_compiler_without_cycles_bounds_no_utilisation() -> None:
    topology = parse_topology("v5e:2x2")
    given = {"model_flops": 4 * 197e12, "bytes_read": 819e9 / 2, "cost_of_kernel": costs}
    bound = time_bound(ProgramCost((), (), ()), topology, topology.mesh("fsdp=4"), **given)
    assert (bound.mfu, bound.seconds, bound.binds) == (None, 1, "compute")


def test_exchanges_of_gpus_go_through_a_switch() -> None:
    topology = parse_topology("h100:8")
    exchange = Collective("all-reduce", 8 * 10**9, tuple(range(8)))
    # A ring of eight sends each array twice, but for its own part; the mesh's devices don't matter.
    mesh = parse_topology("v5e:2x4").mesh("fsdp=8")
    assert network_seconds(exchange, topology, mesh) == pytest.approx(2 * 7e9 / 450e9)


def test_decoding_is_one_run_of_the_open_loop() -> None:
    step = program(overlaps=True).in_open_loop()
    assert step.by_part() == {"decoder MLPs": 0.3 * 1.5e9}
    assert [call.name for call in step.kernels] == ["known"]
    assert step.collectives == ()


def test_kernels_keep_their_slowest_resource_busy() -> None:
    chip = CHIPS["v5e"]
    assert kernel_seconds(KernelCost(197e12, 1.0), chip) == 1
    assert kernel_seconds(KernelCost(1.0, 1.5e9 * 1024), chip) == 10 / 4
    assert kernel_seconds(KernelCost(1.0, 1.0, 819e9), chip) == 1
