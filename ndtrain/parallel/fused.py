"""Attention within documents as one kernel for all rows of a micro batch: varlen flash attention, or FlexAttention.

Both take the borders of the documents as the host knows them, and no mask `[S, S]`. Flash attention takes half
precision without soft caps or sinks, FlexAttention takes the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ndtrain.errors import PlanError

_BLOCK = 128  # FlexAttention's own
_SHORT = 32  # a row of the proof, for which nothing is compiled


class Heads(NamedTuple):
    """What an attention function does with scores beside causal masking.

    `window` counts the last keys that a query sees, `sinks` `[H]` are scores of one more key without a value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


_Kernel = Callable[[Tensor, Tensor, Tensor, "Rows", Heads], Tensor]


class Rows:
    """The first position of each document of each row, and what kernels take of them, made once for all layers."""

    def __init__(self, bounds: list[list[int]]):
        self.bounds = bounds
        self._made: dict[tuple[Any, ...], Any] = {}

    def cumulated(self, length: int, device: torch.device) -> tuple[Tensor, int]:
        """Return where documents begin and end in all rows of `length` as one, int32 `[n + 1]`; and the longest."""
        return self._once(("cumulated", length, device), lambda: self._cumulated(length, device))  # type: ignore[no-any-return]

    def block_mask(self, length: int, device: torch.device, window: int | None) -> Any:
        """Return FlexAttention's mask of rows of `length`, made without any tensor `[length, length]`."""
        return self._once(("blocks", length, device, window), lambda: self._block_mask(length, device, window))

    def _once(self, case: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if case not in self._made:
            self._made[case] = make()
        return self._made[case]

    def _cumulated(self, length: int, device: torch.device) -> tuple[Tensor, int]:
        begins = [number * length + first for number, row in enumerate(self.bounds) for first in row]
        cumulated = np.array([*begins, len(self.bounds) * length], dtype=np.int32)
        return _put(cumulated, device), int(np.diff(cumulated).max())

    def _block_mask(self, length: int, device: torch.device, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        places = np.arange(length)
        found = np.stack([np.searchsorted(row, places, side="right") for row in self.bounds]).astype(np.int32)
        partly, wholly = visible_blocks(found, window)
        documents = _put(found, device)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            apart = (query >= key) & (documents[row, query] == documents[row, key])
            return apart if window is None else apart & (query - key < window)

        counts, indices, full_counts, full_indices = (
            _put(array, device) for blocks in (partly, wholly) for array in _ordered(blocks)
        )
        return BlockMask.from_kv_blocks(
            *(counts, indices, full_counts, full_indices),
            BLOCK_SIZE=_BLOCK,
            mask_mod=sees,
            seq_lengths=(length, length),
        )


def document_bounds(documents: Tensor) -> list[list[int]]:
    """Return the first position of each document, row by row, of `[B, S]` on the host that grow along each row."""
    return [[0, *(np.flatnonzero(np.diff(row)) + 1).tolist()] for row in documents.numpy()]


def visible_blocks(documents: np.ndarray[Any, Any], window: int | None) -> tuple[np.ndarray[Any, Any], ...]:
    """Return which blocks `[B, S / 128, S / 128]` of queries and keys need a mask, and which are seen wholly.

    `documents` `[B, S]` grow along a row.
    """
    length = documents.shape[1]
    first = np.arange(0, length, _BLOCK)
    last = np.minimum(first + _BLOCK, length) - 1
    low, high = documents[:, first], documents[:, last]
    begins, ends = (first[:, None], last[:, None]), (first[None], last[None])  # of queries, of keys
    some = (begins[1] >= ends[0]) & (high[:, None] >= low[:, :, None])
    every = (begins[0] >= ends[1]) & (low[:, None] == high[:, :, None]) & (begins[1] - begins[0] == _BLOCK - 1)
    if window is not None:
        some &= begins[0] - ends[1] < window
        every &= begins[1] - ends[0] < window
    return some & ~every, some & every


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Rows, heads: Heads) -> Tensor:
    """Return the attention `[B, S, H, E]` of query `[B, H, S, D]` to key `[B, G, S, D]` and value `[B, G, S, E]`."""
    short = query.dtype == torch.float32 and query.shape[2] <= _SHORT
    kernel = by_scores if short else kernel_for(query, heads)
    return kernel(query, key, value, rows, heads).to(query.dtype).contiguous()


def kernel_for(query: Tensor, heads: Heads) -> _Kernel:
    """Return `by_flash` or `by_flex`."""
    half = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256
    plain = heads.softcap is None and heads.sinks is None
    return by_flash if half and plain and _varlen() is not None and _is_ampere(query.device) else by_flex


def by_flash(query: Tensor, key: Tensor, value: Tensor, rows: Rows, heads: Heads) -> Tensor:
    """Compute `attend` by `torch.nn.attention.varlen`."""
    batch, _, length, _ = query.shape
    cumulated, longest = rows.cumulated(length, query.device)
    # One head size for all, a multiple of 8: zeros change no score and add zeros to the output.
    size = -(-max(query.shape[-1], value.shape[-1]) // 8) * 8
    wide = (x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
    flat = [x.transpose(1, 2).flatten(0, 1) for x in wide]
    varlen = _varlen()
    assert varlen is not None
    window = -1 if heads.window is None else heads.window - 1  # (-1, 0) is causal
    out: Tensor = varlen(
        *(*flat, cumulated, cumulated, longest, longest),
        scale=heads.scale,
        window_size=(window, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.view(batch, length, *out.shape[1:])[..., : value.shape[-1]]


def by_flex(query: Tensor, key: Tensor, value: Tensor, rows: Rows, heads: Heads) -> Tensor:
    """Compute `attend` by FlexAttention, which is compiled on CUDA."""
    from torch.nn.attention.flex_attention import AuxRequest

    wanted = None if heads.sinks is None else AuxRequest(lse=True)
    found = _flex(query.device.type)(
        *(query, key, value),
        score_mod=None if heads.softcap is None else _capped(heads.softcap),
        block_mask=rows.block_mask(query.shape[2], query.device, heads.window),
        scale=heads.scale,
        enable_gqa=key.shape[1] != query.shape[1],
        return_aux=wanted,
    )
    if heads.sinks is not None:
        # The softmax over one more key: its weight is taken from the others.
        found, more = found
        found = found * torch.sigmoid(more.lse - heads.sinks.float()[None, :, None])[..., None]
    return found.transpose(1, 2)  # type: ignore[no-any-return]


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def prove(query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> str:
    """Raise `PlanError` unless the kernel for long rows and its gradients are right on random rows of such heads.

    Compared with `by_scores`. Returns the kernel's name.
    """
    length, kernel = 300, kernel_for(query, heads)  # several blocks, the last one cut
    generator = torch.Generator(query.device).manual_seed(0)

    def random(like: Tensor) -> Tensor:
        shape = (2, like.shape[1], length, like.shape[-1])
        made = torch.randn(shape, device=like.device, dtype=torch.float32, generator=generator)
        return made.to(like.dtype).requires_grad_()

    q, k, v = random(query), random(key), random(value)
    sinks = None if heads.sinks is None else heads.sinks.detach().clone().requires_grad_()
    learned = [q, k, v] if sinks is None else [q, k, v, sinks]
    small = heads._replace(sinks=sinks, window=None if heads.window is None else min(heads.window, 40))
    rows = Rows([[0, 7, 129, 255], [0]])
    with torch.enable_grad():
        results = [compute(q, k, v, rows, small) for compute in (kernel, by_scores)]
        grad = torch.randn(results[1].shape, device=query.device, generator=generator).to(query.dtype)
        pairs = zip(
            *([out.detach(), *torch.autograd.grad(out, learned, grad.to(out.dtype))] for out in results),
            strict=True,
        )
    limit = 1e-3 if query.dtype == torch.float32 else 5e-2
    for got, want in pairs:
        if not float((got.float() - want.float()).norm()) <= limit * float(want.float().norm()):
            raise PlanError(
                f"{kernel.__name__} of torch {torch.__version__} computes wrong attention for {query.dtype} and head "
                f'size {query.shape[-1]}; set model.attn = "sdpa" or "eager"'
            )
    return _SAID[kernel]


def by_scores(query: Tensor, key: Tensor, value: Tensor, rows: Rows, heads: Heads) -> Tensor:
    """Compute `attend` with all scores in memory, in float32."""
    groups, places = query.shape[1] // key.shape[1], torch.arange(query.shape[2], device=query.device)
    bounds = [torch.tensor(row, device=query.device) for row in rows.bounds]
    documents = torch.stack([torch.searchsorted(row, places, right=True) for row in bounds])
    distance = places[:, None] - places
    seen = (documents[:, :, None] == documents[:, None]) & (distance >= 0)
    if heads.window is not None:
        seen &= distance < heads.window
    q, k, v = (x.float() for x in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    scores = q @ k.mT * heads.scale
    if heads.softcap is not None:
        scores = heads.softcap * torch.tanh(scores / heads.softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if heads.sinks is not None:
        column = heads.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ v).transpose(1, 2)


_SAID: dict[_Kernel, str] = {
    by_flash: "torch's flash attention of variable length",
    by_flex: "FlexAttention (float32, soft caps, sinks, or heads of more than 256)",
}


@cache
def _varlen() -> Callable[..., Any] | None:
    """Return torch's varlen attention; None where it lacks windows or grouped heads (torch 2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    has_all = {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if has_all else None


@cache
def _is_ampere(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _flex(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cuda":
        return flex_attention
    # A graph for each window, length and dtype; one more than the limit would be an error, not slow.
    torch.compiler.config.recompile_limit = max(64, torch.compiler.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _ordered(blocks: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """Return how many blocks each row of blocks has, and which, first those that it has, int32 with a dim of heads."""
    counts, indices = blocks.sum(-1, dtype=np.int32), np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32)
    return counts[:, None], indices[:, None]


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`, without waiting for that."""
    # From memory that is not pinned the host would wait for all that the device has to do before.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _put(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    # In order: numpy's results lie in memory as what they are of, and compiled kernels do not look at strides.
    return put(torch.from_numpy(np.array(array, order="C")), device)
