"""The chips that jobs run on: what their data sheets and the compiler say about them.

Every figure is of one device as JAX counts them; on a chip that is two devices it is half of the
chip's, except for the links, which both devices share.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
        name: as in the name of a topology, such as "v5e".
        title: as people write it.
        devices_per_chip: as JAX counts them.
        devices_per_host: that share a host and its network card.
        peak_flops: of bfloat16 products, a second.
        memory_bytes: of high-bandwidth memory.
        usable_bytes: what the compiler gives to programs.
        memory_bandwidth: bytes a second.
        torus_dims: dimensions of the network between chips; 0 where a switch connects all.
        link_bandwidth: bytes a second that a link carries one way; a chip in the middle has two
            links for each dimension. With a switch: of a device to all others.
        closes_at: a dimension whose size is a multiple of it is a ring; others are lines.
        dcn_bandwidth: bytes a second over the data-center network between slices, one way.
        clock: of the cycles in which the compiler estimates, in Hz.
        vector_lanes: operands that a vector unit takes in a cycle; so many exponentials at most.
        vector_units: that work side by side on every lane.
    """

    name: str
    title: str
    devices_per_chip: int
    devices_per_host: int
    peak_flops: float
    memory_bytes: float
    usable_bytes: int
    memory_bandwidth: float
    torus_dims: int
    link_bandwidth: float
    closes_at: int
    dcn_bandwidth: float
    clock: float
    vector_lanes: int = 1024
    vector_units: int = 4

    @property
    def is_gpu(self) -> bool:
        return self.torus_dims == 0

    @property
    def exponentials(self) -> float:
        """A second, at most: one for each lane and cycle."""
        return self.clock * self.vector_lanes

    @property
    def vector_operations(self) -> float:
        """A second, at most."""
        return self.clock * self.vector_lanes * self.vector_units


# Peak, memory and networks: Google Cloud's pages on each version (docs.cloud.google.com/tpu/docs).
# They give the links' bandwidth as a sum over a chip's 4 or 6 links and both ways.
# usable_bytes: what CompileTimeHbmOom of libtpu 0.0.52 calls available.
# clock: peak_flops over the operations that the matrix units finish in a cycle. In the compiler's
# cycles products of (4096, 4096) and (4096, 14336) come to 98 % of the peak on v5e, 97 % on v5p and
# 89 % on v6e; of 16384-cubed, to 92 %, 94 % and 78 %, as memory delays them.
# Vector units have 8 × 128 lanes and do one transcendental a lane and cycle (Austin et al., How to
# Scale Your Model); two cores make one device of v4 and v5p.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            title="TPU v4",
            devices_per_chip=1,  # two cores that the compiler drives as one ("megacore")
            devices_per_host=4,
            peak_flops=275e12,
            memory_bytes=32 * GIB,
            usable_bytes=int(30.75 * GIB),
            memory_bandwidth=1228e9,
            torus_dims=3,
            link_bandwidth=50e9,
            closes_at=4,
            dcn_bandwidth=6.25e9,
            clock=1.05e9,
            vector_lanes=2048,
        ),
        Chip(
            name="v5e",
            title="TPU v5e",
            devices_per_chip=1,
            devices_per_host=8,
            peak_flops=197e12,
            memory_bytes=16 * GIB,
            usable_bytes=int(15.75 * GIB),
            memory_bandwidth=819e9,
            torus_dims=2,
            link_bandwidth=50e9,  # 400 GB/s over 4 links, both ways
            closes_at=16,
            dcn_bandwidth=3.125e9,  # 6.4 Tbit/s a pod of 256
            clock=1.5e9,
        ),
        Chip(
            name="v5p",
            title="TPU v5p",
            devices_per_chip=1,
            devices_per_host=4,
            peak_flops=459e12,
            memory_bytes=95.74 * GIB,
            usable_bytes=int(95.73 * GIB),
            memory_bandwidth=2765e9,
            torus_dims=3,
            link_bandwidth=100e9,  # 1200 GB/s over 6 links, both ways
            closes_at=4,
            dcn_bandwidth=6.25e9,  # 50 Gbit/s a chip
            clock=1.75e9,
            vector_lanes=2048,
        ),
        Chip(
            name="v6e",
            title="TPU v6e",
            devices_per_chip=1,
            devices_per_host=8,
            peak_flops=918e12,
            memory_bytes=32 * GIB,
            usable_bytes=int(31.24 * GIB),
            memory_bandwidth=1638e9,
            torus_dims=2,
            link_bandwidth=100e9,  # 800 GB/s over 4 links, both ways
            closes_at=16,
            dcn_bandwidth=12.5e9,  # 100 Gbit/s a chip
            clock=1.75e9,
        ),
        Chip(
            name="tpu7x",
            title="TPU7x",
            devices_per_chip=2,
            devices_per_host=8,
            peak_flops=2307e12 / 2,
            memory_bytes=96 * GIB,
            usable_bytes=int(94.74 * GIB),
            memory_bandwidth=7380e9 / 2,
            torus_dims=3,
            link_bandwidth=100e9,  # 1200 GB/s over 6 links, both ways
            closes_at=4,
            dcn_bandwidth=6.25e9,  # 100 Gbit/s a chip
            clock=2.2e9,
        ),
        # NVIDIA's data sheet of the SXM5 module: dense bfloat16; NVLink 900 GB/s both ways.
        Chip(
            name="h100",
            title="H100 SXM",
            devices_per_chip=1,
            devices_per_host=8,
            peak_flops=989e12,
            memory_bytes=84942979072,
            # What JAX takes of it with XLA_CLIENT_MEM_FRACTION=0.92; 0.75 is its default.
            usable_bytes=int(0.92 * 84942979072),
            memory_bandwidth=3350e9,
            torus_dims=0,
            link_bandwidth=450e9,
            closes_at=1,
            dcn_bandwidth=50e9,  # a network card of 400 Gbit/s each
            clock=1.83e9,
        ),
        # Only for the utilisation that a run shows; NVIDIA's data sheets of the SXM modules, dense.
        *(
            Chip(
                name=name,
                title=title,
                devices_per_chip=1,
                devices_per_host=8,
                peak_flops=peak_flops,
                memory_bytes=memory_bytes,
                usable_bytes=int(memory_bytes),
                memory_bandwidth=memory_bandwidth,
                torus_dims=0,
                link_bandwidth=link_bandwidth,
                closes_at=1,
                dcn_bandwidth=dcn_bandwidth,
                clock=clock,
            )
            for name, title, peak_flops, memory_bytes, memory_bandwidth, link_bandwidth, *rest in (
                ("a100", "A100 SXM", 312e12, 80e9, 2039e9, 300e9, 25e9, 1.41e9),
                ("h200", "H200 SXM", 989e12, 141e9, 4800e9, 450e9, 50e9, 1.83e9),
                ("b200", "B200", 2250e12, 180e9, 7700e9, 900e9, 50e9, 1.85e9),
            )
            for dcn_bandwidth, clock in (rest,)
        ),
    )
}
"""Kinds of devices by the name that starts a topology's."""

DEVICE_KINDS: Mapping[str, str] = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""What JAX calls the devices, and their name in `CHIPS`."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None if it is not known."""
    name = DEVICE_KINDS.get(device_kind)
    return None if name is None else CHIPS[name]
