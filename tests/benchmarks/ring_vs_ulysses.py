"""Ring against Ulysses on the same attention, forward and backward, in one run on gloo ranks.

    python -m tests.benchmarks.ring_vs_ulysses [--ranks 4] [--seq 4096] [--heads 8] [--keys 2] [--size 64]

Prints the median seconds of a call and what a rank sends in one, and of each the ratio; also of a ring that gathers all
keys and values at once instead of passing them on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ndtrain.parallel.cp import kernels, ring, ulysses
from ndtrain.parallel.cp.visible import CAUSAL, Visible
from tests.ranks import RankPool


class Sent:
    """Bytes that this rank hands to other ranks."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        pass_on, exchange = ring.pass_on, dist.all_to_all_single

        def count_pass_on(buffer: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
            self.bytes += buffer.nbytes
            return pass_on(buffer, group)

        def count_exchange(output: Tensor, tensor: Tensor, *, group: dist.ProcessGroup) -> Any:
            self.bytes += tensor.nbytes * (group.size() - 1) // group.size()
            return exchange(output, tensor, group=group)

        with (
            mock.patch.object(ring, "pass_on", count_pass_on),
            mock.patch.object(dist, "all_to_all_single", count_exchange),
        ):
            yield


def gathered(block: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """What a ring that gathers would do instead of passing on: every rank's block at once."""
    parts = [torch.empty_like(block) for _ in range(group.size())]
    dist.all_gather(parts, block, group=group)
    return parts


def measure(seq: int, heads: int, keys: int, size: int, dtype: str, repeats: int) -> dict[str, tuple[float, int]]:
    group, cp, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    shapes = [(1, n, seq // cp, size) for n in (heads, keys, keys)]
    inputs = [torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=True) for shape in shapes]
    seen = Visible(CAUSAL, length=seq // (2 * cp), rank=rank, cp=cp)

    def by_ring() -> Tensor:
        kernel = kernels.choose(inputs[0], softcap=None, plain=False)
        return ring.ring_attention(*inputs, seen=seen, kernel=kernel, scale=size**-0.5, group=group)

    def by_ulysses() -> Tensor:
        query, *others = inputs
        held = max(1, cp // keys)
        others = [t.repeat_interleave(held, dim=1) for t in others] if held > 1 else others
        query, key, value = ulysses.heads_for_sequence([query, *others], group)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return ulysses.sequence_for_heads(out.transpose(1, 2), group)

    calls: dict[str, Callable[[], Tensor]] = {"ring": by_ring}
    if heads % cp == 0:
        calls["ulysses"] = by_ulysses
    sent, times = {name: Sent() for name in calls}, {name: list[float]() for name in calls}
    for name, call in calls.items():
        with sent[name].counting():
            call().sum().backward()
    # In turns, so that other load meets both alike.
    for _ in range(repeats):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call().sum().backward()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(times[name]), sent[name].bytes) for name in calls}


def exchange(seq: int, keys: int, size: int, dtype: str, repeats: int) -> dict[str, float]:
    """Median seconds in which all ranks' keys and values reach every rank, without any attention."""
    group, cp = dist.group.WORLD, dist.get_world_size()
    block = torch.randn(2 * keys * seq // cp * size).to(getattr(torch, dtype))

    def passed() -> None:
        travelling = block
        for _ in range(cp - 1):
            travelling = ring.pass_on(travelling, group)()

    found = {}
    for name, call in {"passed on": passed, "gathered": lambda: gathered(block, group)}.items():
        times = []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            times.append(time.perf_counter() - start)
        found[name] = statistics.median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"ranks": 4, "seq": 4096, "heads": 8, "keys": 2, "size": 64, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    pool = RankPool(options.ranks)
    shape = (options.seq, options.heads, options.keys, options.size, options.dtype, options.repeats)
    found = pool.run(measure, *shape, timeout=600)[0]
    moved = pool.run(exchange, options.seq, options.keys, options.size, options.dtype, options.repeats)[0]
    pool.close()
    for name, (seconds, sent) in found.items():
        print(f"{name:8} {seconds:.3f} s, {sent / 2**20:.1f} MiB sent by a rank")
    if "ulysses" in found:
        time_ratio, byte_ratio = (found["ring"][i] / found["ulysses"][i] for i in (0, 1))
        print(f"ring / ulysses: {time_ratio:.2f} x the time, {byte_ratio:.2f} x the bytes")
    print(f"keys and values to all ranks: passed on {moved['passed on']:.4f} s, gathered {moved['gathered']:.4f} s")


if __name__ == "__main__":
    main()
