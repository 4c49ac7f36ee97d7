"""Machines, as their vendors describe them, for benchmarks/scaling.py.

TPU v5e: 197e12 operations, 819 GB/s and 16 GB of memory, 400 GB/s of wires in both directions
together, 8 chips on a host (Google's page of the TPU v5e); its host has 224 virtual processors,
taken as 112 cores. H100 SXM: 989e12 operations in TF32 with sparsity, which is not used here,
3.35 TB/s and 80 GB of memory, 900 GB/s of NVLink in both directions together (NVIDIA's data sheet);
its host has 2 x 56 cores and a 400 Gb/s network card for each GPU, as in a DGX H100.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and what their vendor publishes; rates are of one device, per second.

    Attributes:
        name: what the tables call it.
        compiled: the target of benchmarks/collectives.py whose programs stand for it.
        devices: how many there are.
        images: of a batch, on each device.
        operations: peak, in the precision that float32 arrays are multiplied in by default.
        memory: bytes to and from its memory.
        capacity: bytes of its memory.
        inner: bytes that a device can send to others of its host, or over the whole torus.
        outer: bytes that it can send beyond its host; 0 if ``inner`` reaches all.
        per_host: how many share a host.
        cores: of each host.
    """

    name: str
    compiled: str
    devices: int
    images: int
    operations: float
    memory: float
    capacity: float
    inner: float
    outer: float = 0.0
    per_host: int = 8
    cores: int = 112

    @property
    def hosts(self) -> int:
        return max(1, self.devices // self.per_host)

    @property
    def batch(self) -> int:
        return self.images * self.devices

    def exchange(self, payload: float) -> float:
        """Return the seconds of an all-reduce at full bandwidth."""
        if not self.outer:
            return 2 * payload * (self.devices - 1) / self.devices / self.inner
        group = min(self.per_host, self.devices)
        within = 2 * payload * (group - 1) / group / self.inner
        across = 2 * payload / group * (self.hosts - 1) / self.hosts / self.outer
        return within + across


V5E = dict(operations=197e12, memory=819e9, capacity=16e9, inner=200e9)
H100 = dict(operations=494.7e12, memory=3.35e12, capacity=80e9, inner=450e9, outer=50e9)
POD, NODES = "tpu:v5e:16x16", "cuda:H200:2x8"
MACHINES = (
    Machine("v5e-256", POD, devices=256, images=256, **V5E),
    Machine("8 H100s", NODES, devices=8, images=256, **H100),
    Machine("4 x 8 H100s", NODES, devices=32, images=256, **H100),
    Machine("32 x 8 H100s", NODES, devices=256, images=256, **H100),
    # not a torus: chips in its corners have two of the four wires
    Machine("v5e-8", "tpu:v5e:2x4", devices=8, images=32, **V5E | {"inner": 100e9}),
    Machine("2 x 8 H100s", NODES, devices=16, images=16, **H100),
)
