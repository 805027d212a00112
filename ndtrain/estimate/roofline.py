"""The least time of a step: every operation at the device's peak, every collective at the links' bandwidth.

The model of S. Williams et al., "Roofline" (CACM 52, 2009), applied to each operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ndtrain.accelerators import Device
from ndtrain.estimate.record import ON_HOST, TO_DEVICE, TO_HOST, TO_HOST_WAITING, Collective, Record

# FSDP's collectives, which overlap with computation.
OVERLAPPED = ("fsdp", "efsdp", "dp_replicate")
# Part of the memory for the driver, communication buffers and fragmentation.
RESERVED = 0.06

_ASSUMPTIONS = (
    "each operation takes the time of its arithmetic or of its reads and writes, whichever is longer, at the device's "
    "peak; nothing is fused",
    "FSDP's collectives overlap with computation, all others do not; links reach their full bandwidth, latency is not "
    "counted",
    "every token is a target; all experts get the same number of tokens",
    f"{RESERVED:.0%} of the memory is reserved for the driver, communication buffers and fragmentation",
    "cpu_offload copies float32 parameters to the device for every gather and gradients back after every backward "
    "pass; copies overlap with computation and collectives, but a gradient that the host adds to that of an earlier "
    "micro batch is waited for; what the host computes (sums and the norm of gradients, the optimizer) overlaps "
    "with nothing and takes the time of its reads and writes; the host has enough memory",
)


def assumptions(device: Device, on_node: int) -> list[str]:
    """Return what `times` assumes, a sentence each; `on_node` ranks share a host."""
    pcie, host = device.pcie / 1e9, device.host_bandwidth / 1e9
    who = f"the {on_node} ranks of a node" if on_node > 1 else "the rank of a node"
    return [
        *_ASSUMPTIONS,
        f"cpu_offload copies {host_link(device, on_node) / 1e9:,.4g} GB/s each way (pcie = {pcie:,.4g} GB/s, or a "
        f"rank's share of its host's memory if less); {who} can read and write {host:,.4g} GB/s of host memory "
        f"(host_bandwidth), {host / on_node:,.4g} GB/s each",
    ]


@dataclass(frozen=True)
class Times:
    """Seconds of one step on one rank."""

    compute: float
    by_flops: float  # the part of `compute` in operations bound by arithmetic; memory bounds the rest
    sent: dict[str, float]  # by axis, in total
    exposed: dict[str, float]  # by axis, the part that does not overlap with computation
    host: dict[str, float]  # of what cpu_offload adds, in total: "copies to devices", "copies to hosts", "host memory"
    host_exposed: dict[str, float]

    @property
    def step(self) -> float:
        return self.compute + sum(self.exposed.values()) + sum(self.host_exposed.values())

    @property
    def bound(self) -> str:
        """The name of the largest part of the step."""
        parts = {"compute": self.by_flops, "memory bandwidth": self.compute - self.by_flops}
        parts |= {f"communication over {axis}": seconds for axis, seconds in self.exposed.items()}
        parts |= self.host_exposed
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
    on_node: int,
) -> Times:
    """Return the times of a step. `weighted` sums over records.

    `axes` has (ranks on a node, nodes) of each axis; `on_node` ranks of any axis share a host.
    """

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

    def host(what: str) -> float:
        return weighted(lambda record: record.host[what])

    behind = computing + sum(exposed[axis] for axis in exposed if axis in OVERLAPPED)
    link = host_link(device, on_node)
    to_device, to_host, waiting = (host(what) / link for what in (TO_DEVICE, TO_HOST, TO_HOST_WAITING))
    in_memory = host(ON_HOST) / (device.host_bandwidth / on_node)
    # The two directions of a link do not slow each other.
    first, second = max(0.0, to_device - behind), max(0.0, to_host - behind)
    on_host = {
        "copies to devices": (to_device, first),
        "copies to hosts": (to_host + waiting, waiting + max(0.0, second - first)),
        "host memory": (in_memory, in_memory),
    }
    return Times(
        compute=computing,
        by_flops=weighted(by_flops),
        sent=sent,
        exposed=exposed,
        host={name: total for name, (total, _) in on_host.items() if total},
        host_exposed={name: alone for name, (total, alone) in on_host.items() if total},
    )


def host_link(device: Device, on_node: int) -> float:
    """Return the bytes per second, in each direction, between a device and its host while all ranks of a node copy."""
    return min(device.pcie, device.host_bandwidth / on_node)
