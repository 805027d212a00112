"""Muon (https://kellerjordan.github.io/posts/muon): momentum whose singular values are made alike, matrix by matrix.

A matrix is needed whole for that. Ranks hold parts, so the parts of a bucket of matrices go to one rank each by an
all-to-all, are orthogonalized there, and come back by another: every rank computes a share of the matrices, balanced by
FLOPs. What is no matrix of a hidden layer is AdamW's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ndtrain.engine.adamw import adamw_step
from ndtrain.engine.rounding import Rounding
from ndtrain.layout import Box, local_part
from ndtrain.mesh import MeshSizes
from ndtrain.plan import ParamPlan

# Of the polynomial x (a + b x x^T + c (x x^T)^2), which is applied five times (from the source above).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_TIMES = 5
# Bytes of bfloat16 that a rank has of whole matrices at once, if no matrix is larger.
BUCKET = 64 << 20
# What it keeps for each matrix.
MUON_STATE = ("momentum_buffer",)


def orthogonalized(x: Tensor) -> Tensor:
    """Return matrices `[N, A, B]` in bfloat16 with singular values near 1, as `torch.optim.Muon` computes them."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_TIMES):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def adjusted(lr: float, shape: Sequence[int], how: str) -> float:
    """Return the learning rate of a matrix `[A, B]`: "original", or "match_rms_adamw" (arXiv:2502.16982)."""
    a, b = shape
    return lr * (math.sqrt(max(1, a / b)) if how == "original" else 0.2 * math.sqrt(max(a, b)))


class Piece(NamedTuple):
    """A part of a matrix that a rank holds: where it is in the matrix, and in the rank's tensor."""

    inside: tuple[slice, ...]
    local: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.inside)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Matrix(NamedTuple):
    """The pieces of a matrix, each with the ranks that hold it, and which of them each rank holds."""

    pieces: list[list[tuple[int, Piece]]]
    of_rank: dict[int, list[int]]


class Cut:
    """How parameters of one layout are cut: their matrices, one, or one for each expert."""

    def __init__(self, param: ParamPlan, sizes: MeshSizes) -> None:
        self.shape = (param.shape[-2], param.shape[-1])
        self.count = param.shape[0] if len(param.shape) == 3 else 1
        self._boxes = [param.boxes(sizes, rank) for rank in range(sizes.world_size)]
        self._experts = len(param.shape) == 3
        self._found: dict[int, Matrix] = {}

    def matrix(self, number: int) -> Matrix:
        """Return matrix `number`."""
        if number not in self._found:
            held: dict[tuple[tuple[int, int], ...], list[tuple[int, Piece]]] = {}
            for rank, boxes in enumerate(self._boxes):
                for piece in filter(None, (self._piece(box, number) for box in boxes)):
                    held.setdefault(tuple((s.start, s.stop) for s in piece.inside), []).append((rank, piece))
            of_rank: dict[int, list[int]] = {}
            for at, copies in enumerate(held.values()):
                for rank, _ in copies:
                    of_rank.setdefault(rank, []).append(at)
            self._found[number] = Matrix(list(held.values()), of_rank)
        return self._found[number]

    def _piece(self, box: Box, number: int) -> Piece | None:
        if not self._experts:
            return Piece(box.inside, box.local)
        at = number - box.offsets[0]
        return Piece(box.inside[1:], (box.local_offsets[0] + at, *box.local[1:])) if 0 <= at < box.sizes[0] else None

    @cached_property
    def flops(self) -> int:
        """The FLOPs of one matrix."""
        small, large = sorted(self.shape)
        return _TIMES * 2 * small * small * (2 * large + small)


class Part(NamedTuple):
    """A piece on its way: the number of its parameter in the bucket, and of its matrix among this rank's, if it is."""

    param: int
    matrix: int
    piece: Piece


@dataclass
class Bucket:
    """Parameters whose matrices are whole at once, and what this rank sends and gets for them.

    `given` and `taken` are ordered by the other rank, and for each rank alike on both sides.
    """

    params: list[int]
    shapes: list[tuple[int, int]] = field(default_factory=list)  # of the matrices that this rank orthogonalizes
    given: list[list[Part]] = field(default_factory=list)  # to each owner, of this rank's parameters
    taken: list[list[Part]] = field(default_factory=list)  # from each rank, into this rank's matrices
    returned: list[list[Part]] = field(default_factory=list)  # to each rank, of this rank's matrices
    received: list[list[Part]] = field(default_factory=list)  # from each owner, into this rank's parameters


def plan_buckets(cuts: Sequence[Cut], *, rank: int, ranks: int, limit: int = BUCKET) -> list[Bucket]:
    """Return the buckets of parameters cut like `cuts`, for `rank`; every rank computes the same owners."""
    buckets: list[Bucket] = []
    held = math.inf
    for number, cut in enumerate(cuts):
        size = 2 * cut.count * math.prod(cut.shape)
        if held + size > limit * ranks:
            buckets.append(Bucket([]))
            held = 0
        buckets[-1].params.append(number)
        held += size
    before = [0] * ranks
    for bucket in buckets:
        _fill(bucket, cuts, rank, before)
    return buckets


def _fill(bucket: Bucket, cuts: Sequence[Cut], rank: int, before: list[int]) -> None:
    """Choose an owner for each matrix of the bucket; `before` has the FLOPs of each rank, and is added to."""
    ranks = len(before)
    sides: list[list[list[Part]]] = [[[] for _ in range(ranks)] for _ in range(4)]
    bucket.given, bucket.taken, bucket.returned, bucket.received = sides
    load = [(0, before[each], each) for each in range(ranks)]
    heapq.heapify(load)
    matrices = [(at, m) for at, number in enumerate(bucket.params) for m in range(cuts[number].count)]
    matrices.sort(key=lambda one: -cuts[bucket.params[one[0]]].flops)  # stable
    for at, number in matrices:
        cut = cuts[bucket.params[at]]
        flops, _, owner = load[0]
        before[owner] += cut.flops
        heapq.heapreplace(load, (flops + cut.flops, before[owner], owner))
        matrix = cut.matrix(number)
        own = len(bucket.shapes) if owner == rank else -1
        if owner == rank:
            bucket.shapes.append(cut.shape)
        for held in range(len(matrix.pieces)) if owner == rank else matrix.of_rank.get(rank, ()):
            copies = matrix.pieces[held]
            sender, sent = min(copies, key=lambda copy: (abs(copy[0] - owner), copy[0]))  # of replicas one sends
            if owner == rank:
                bucket.taken[sender].append(Part(at, own, sent))
            if sender == rank:
                bucket.given[owner].append(Part(at, own, sent))
            for holder, piece in copies:
                if owner == rank:
                    bucket.returned[holder].append(Part(at, own, piece))
                if holder == rank:
                    bucket.received[owner].append(Part(at, own, piece))


def exchange(bucket: Bucket, updates: Sequence[Tensor], device: torch.device) -> None:
    """Replace this rank's parts of the updates of a bucket (bfloat16) by those of the orthogonalized matrices.

    Collective over all ranks. What is in host memory is computed on the device all the same.
    """
    sent = _sent([[updates[part.param][part.piece.local] for part in parts] for parts in bucket.given], device)
    got = _all_to_all(sent, bucket.given, bucket.taken)
    wholes = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in bucket.shapes]
    for part, value in zip((p for parts in bucket.taken for p in parts), got, strict=True):
        wholes[part.matrix][part.piece.inside] = value
    alike: dict[tuple[int, int], list[int]] = {}
    for number, shape in enumerate(bucket.shapes):
        alike.setdefault(shape, []).append(number)
    for numbers in alike.values():
        found = orthogonalized(torch.stack([wholes[number] for number in numbers]))
        for number, value in zip(numbers, found, strict=True):
            wholes[number] = value
    sent = _sent([[wholes[part.matrix][part.piece.inside] for part in parts] for parts in bucket.returned], device)
    got = _all_to_all(sent, bucket.returned, bucket.received)
    for part, value in zip((p for parts in bucket.received for p in parts), got, strict=True):
        updates[part.param][part.piece.local] = value


def _sent(parts: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    flat = [part.reshape(-1).to(device) for of_rank in parts for part in of_rank]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.bfloat16, device=device)


def _all_to_all(sent: Tensor, given: Sequence[Sequence[Part]], taken: Sequence[Sequence[Part]]) -> list[Tensor]:
    """Send `sent`, which is made of the parts `given` to each rank, and return the parts `taken` from each."""
    into, out_of = ([sum(part.piece.numel for part in parts) for parts in side] for side in (taken, given))
    got = sent.new_empty(sum(into))
    dist.all_to_all_single(got, sent, into, out_of)
    pieces = [part.piece for parts in taken for part in parts]
    return [flat.view(p.shape) for flat, p in zip(got.split([p.numel for p in pieces]), pieces, strict=True)]


class Muon(torch.optim.Optimizer):
    """Muon for the groups whose "matrices" are the parameters' FQNs, and AdamW for the others.

    All groups have "lr" and "weight_decay". Momentum is torch's: an average, with Nesterov's look ahead.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        params: Mapping[str, ParamPlan],
        sizes: MeshSizes,
        *,
        momentum: float,
        adjust_lr: str,
        betas: tuple[float, float],
        eps: float,
        device: torch.device,
        rounding: Rounding,
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        self._momentum, self._adjust, self._device, self.rounding = momentum, adjust_lr, device, rounding
        layouts: dict[Any, Cut] = {}
        self._cuts: list[Cut] = []
        self._held: list[tuple[Tensor, dict[str, Any]]] = []  # each parameter with its group
        for group in self.param_groups:
            for param, fqn in zip(group["params"], group["matrices"], strict=True) if group["matrices"] else ():
                planned = params[fqn]
                key = (planned.shape, planned.axes, planned.placements)
                if key not in layouts:
                    layouts[key] = Cut(planned, sizes)
                self._cuts.append(layouts[key])
                self._held.append((param, group))
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._buckets = plan_buckets(self._cuts, rank=rank, ranks=sizes.world_size)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make a step. Where `found_inf`, a scalar on the device, is 1, nothing changes."""
        for bucket in self._buckets:
            updates = [self._moved(*self._held[number]) for number in bucket.params]
            exchange(bucket, updates, self._device)
            for number, update in zip(bucket.params, updates, strict=True):
                param, group = self._held[number]
                if param.grad is None:
                    continue
                local, lr = local_part(param), group["lr"]
                kept = local.clone() if self.found_inf is not None else None
                local.mul_(1 - lr * group["weight_decay"])
                local.add_(update, alpha=-adjusted(lr, self._cuts[number].shape, self._adjust))
                if kept is not None:
                    local.copy_(torch.where(self._skips(local), kept, local))
        for group in self.param_groups:
            if not group["matrices"]:
                adamw_step(group, self.state, self.rounding, found_inf=self.found_inf)

    def _moved(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """Return this rank's part of the momentum with the look ahead, in bfloat16, and keep the momentum."""
        if param.grad is None:
            return torch.zeros_like(local_part(param), dtype=torch.bfloat16)
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=group["state_dtype"])
        buffer, grad = local_part(state["momentum_buffer"]), local_part(param.grad)
        moved = buffer.float().lerp(grad, 1 - self._momentum)
        kept = torch.where(self._skips(buffer), buffer.float(), moved) if self.found_inf is not None else moved
        self.rounding.store(param, [buffer], [kept])
        return grad.lerp(moved, self._momentum).bfloat16()

    def _skips(self, like: Tensor) -> Tensor:
        assert self.found_inf is not None
        return self.found_inf.to(like.device).bool()
