"""How long a step takes at least: every operation at the device's peak, every exchange at its links' bandwidth.

The model of S. Williams et al., "Roofline" (CACM 52, 2009), taken operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ndtrain.accelerators import Device
from ndtrain.estimate.record import Collective, Record

# What FSDP exchanges while something else is computed.
OVERLAPPED = ("fsdp", "efsdp", "dp_replicate")
# Context, communication buffers and what the allocator cannot use.
RESERVED = 0.06

ASSUMPTIONS = (
    "each operation takes what it computes or what it reads and writes, whichever is longer, at the device's peak; "
    "nothing is fused",
    "exchanges of FSDP go on beside the computation, all others are waited for; links give their full bandwidth, "
    "latency is not counted",
    "every token is a target; experts get as many tokens each",
    f"{RESERVED:.0%} of the memory is kept for the driver, communication buffers and fragments",
)


@dataclass(frozen=True)
class Times:
    """Seconds of one step on one rank."""

    compute: float
    by_flops: float  # the part of `compute` in operations bound by arithmetic; the rest waits for memory
    sent: dict[str, float]  # by axis, all of it
    exposed: dict[str, float]  # by axis, what is not hidden behind the computation

    @property
    def step(self) -> float:
        return self.compute + sum(self.exposed.values())

    @property
    def bound(self) -> str:
        """What takes the largest part of the step."""
        parts = {"compute": self.by_flops, "memory bandwidth": self.compute - self.by_flops}
        parts |= {f"communication over {axis}": seconds for axis, seconds in self.exposed.items()}
        return max(parts, key=lambda name: parts[name])


def seconds(what: Collective, device: Device, *, on_node: int, nodes: int) -> float:
    """Time of a collective of `on_node` ranks on each of `nodes`: the slower of the links inside a node and between.

    A ring passes every byte but its own part; between nodes each rank's card takes its share (the busbw of nccl-tests).
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
    """The roofline of a step. `axes` has (ranks on a node, nodes) of each; `weighted` sums over records."""

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
