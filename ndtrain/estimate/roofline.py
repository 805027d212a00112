"""The least time of a step: every operation at the device's peak, every collective at the links' bandwidth.

The model of S. Williams et al., "Roofline" (CACM 52, 2009), applied to each operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ndtrain.accelerators import Device
from ndtrain.estimate.record import Collective, Record

# FSDP's collectives, which overlap with computation.
OVERLAPPED = ("fsdp", "efsdp", "dp_replicate")
# Part of the memory for the driver, communication buffers and fragmentation.
RESERVED = 0.06

ASSUMPTIONS = (
    "each operation takes the time of its arithmetic or of its reads and writes, whichever is longer, at the device's "
    "peak; nothing is fused",
    "FSDP's collectives overlap with computation, all others do not; links reach their full bandwidth, latency is not "
    "counted",
    "every token is a target; all experts get the same number of tokens",
    f"{RESERVED:.0%} of the memory is reserved for the driver, communication buffers and fragmentation",
)


@dataclass(frozen=True)
class Times:
    """Seconds of one step on one rank."""

    compute: float
    by_flops: float  # the part of `compute` in operations bound by arithmetic; memory bounds the rest
    sent: dict[str, float]  # by axis, in total
    exposed: dict[str, float]  # by axis, the part that does not overlap with computation

    @property
    def step(self) -> float:
        return self.compute + sum(self.exposed.values())

    @property
    def bound(self) -> str:
        """The name of the largest part of the step."""
        parts = {"compute": self.by_flops, "memory bandwidth": self.compute - self.by_flops}
        parts |= {f"communication over {axis}": seconds for axis, seconds in self.exposed.items()}
        return max(parts, key=lambda name: parts[name])


def seconds(what: Collective, device: Device, *, on_node: int, nodes: int) -> float:
    """Return the seconds of a collective over `nodes` nodes of `on_node` ranks each, bound by the slower links.

    In a ring every rank passes on all bytes but its own part; between nodes each rank's network card takes its share
    (busbw of nccl-tests).
    """
    rounds = 2 if what.op == "all_reduce" else 1
    inside = what.bytes * rounds * (on_node - 1) / on_node / device.intra
    if what.op == "all_to_all":
        return max(inside, what.bytes * (what.ranks - on_node) / what.ranks / device.inter)
    return max(inside, what.bytes * rounds * (nodes - 1) / nodes / (on_node * device.inter))


def times(
    weighted: Callable[[Callable[[Record], float]], float],
    axes: dict[str, tuple[int, int]],
    device: Device,
) -> Times:
    """Return the times of a step. `axes` has (ranks on a node, nodes) of each axis; `weighted` sums over records."""

    def compute(record: Record) -> float:
        return sum(n * max(w.flops / device.peak(w.dtype), w.bytes / device.bandwidth) for w, n in record.work.items())

    def by_flops(record: Record) -> float:
        bound = ((n, w.flops / device.peak(w.dtype), w.bytes / device.bandwidth) for w, n in record.work.items())
        return sum(n * arithmetic for n, arithmetic, moving in bound if arithmetic > moving)

    def over(axis: str) -> Callable[[Record], float]:
        on_node, nodes = axes[axis]
        return lambda record: sum(
            n * seconds(c, device, on_node=on_node, nodes=nodes) for c, n in record.sent.items() if c.axis == axis
        )

    computing = weighted(compute)
    sent = {axis: weighted(over(axis)) for axis in axes}
    sent = {axis: time for axis, time in sent.items() if time}
    hidden = computing
    exposed = {}
    for axis, time in sent.items():
        if axis in OVERLAPPED:
            exposed[axis], hidden = max(0.0, time - hidden), max(0.0, hidden - time)
        else:
            exposed[axis] = time
    return Times(compute=computing, by_flops=weighted(by_flops), sent=sent, exposed=exposed)
