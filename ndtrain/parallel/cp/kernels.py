"""Kernels for one block of ring attention: some queries, some keys, with the log-sum-exp, forward and backward.

All take query `[B, H, Q, D]`, key `[B, G, K, D]`, value `[B, G, K, E]` with H a multiple of G. The backward pass takes
the output and the log-sum-exp over all keys, not only the block's, so that it computes the final probabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ndtrain.errors import PlanError
from ndtrain.torch_compat import (
    efficient,
    efficient_backward,
    flash,
    flash_backward,
    flash_for_cpu,
    flash_for_cpu_backward,
)

INF = float("inf")


class Kernel(ABC):
    """Computes the attention of a block, forward and backward."""

    multiple = 1  # head sizes are padded to a multiple of this
    one_size = True  # keys and values have the same head size

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output `[B, H, Q, E]` and the float32 log-sum-exp `[B, H, Q]`.

        They are 0 and -inf where a query sees none of the keys.
        """
        size = value.shape[-1]
        query, key, value = self._fit(query, key, value)
        if mask is None:
            out, lse = self._forward(query, key, value, scale=scale, causal=causal, mask=None)
            return out[..., :size], lse
        # Kernels disagree on the output of a row that sees nothing.
        seen = mask.any(-1, keepdim=True)
        out, lse = self._forward(query, key, value, scale=scale, causal=causal, mask=mask | ~seen)
        return out[..., :size].masked_fill(~seen, 0), lse.masked_fill(~seen.squeeze(-1), -INF)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value; `out` and `lse` (finite) are those over all keys."""
        groups = key.shape[1]
        sizes = query.shape[-1], key.shape[-1], value.shape[-1]
        query, key, value = self._fit(query, key, value)
        grad_out, out = (F.pad(t, (0, value.shape[-1] - sizes[2])).contiguous() for t in (grad_out, out))
        grads = self._backward(grad_out, query, key, value, out, lse, scale=scale, causal=causal, mask=mask)
        dq, dk, dv = (g[..., :size] for g, size in zip(grads, sizes, strict=True))
        if groups < dk.shape[1]:
            dk, dv = (g.unflatten(1, (groups, -1)).sum(2, dtype=torch.float32) for g in (dk, dv))
        return dq, dk, dv

    def _fit(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        sizes = [t.shape[-1] for t in (query, key, value)]
        if self.one_size:
            sizes = [max(sizes)] * 3
        sizes = [size + -size % self.multiple for size in sizes]
        # Zeros change no score (the scale is an argument) and add columns of zeros to the output.
        query, key, value = (
            F.pad(t, (0, size - t.shape[-1])) if size > t.shape[-1] else t
            for t, size in zip((query, key, value), sizes, strict=True)
        )
        return query, key, value

    @abstractmethod
    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Plain(Kernel):
    """Holds all scores in memory in float32; works for everything, including soft caps (Gemma 2)."""

    one_size = False

    def __init__(self, softcap: float | None = None):
        self.softcap = softcap

    def _scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        scores = query @ key.mT * scale
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    @staticmethod
    def _hide(scores: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
        if causal:
            below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            mask = below if mask is None else mask & below
        return scores if mask is None else scores.masked_fill(~mask, -INF)

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (_float(t) for t in (query, key, value))
        scores = self._hide(self._scores(query, key, scale), causal=causal, mask=mask)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp() @ value, lse

    def _backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, query, key, value, out = (_float(t) for t in (grad_out, query, key, value, out))
        scores = self._scores(query, key, scale)
        probs = (self._hide(scores, causal=causal, mask=mask) - lse[..., None]).exp()
        grad = probs * (grad_out @ value.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
        if self.softcap is not None:
            grad = grad * (1 - (scores / self.softcap).square())
        return grad @ key, grad.mT @ query, probs.mT @ grad_out


class CpuFlash(Kernel):
    """Calls torch's flash attention on CPU."""

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return flash_for_cpu(  # type: ignore[no-any-return]
            query, key, value, 0.0, causal, attn_mask=_bias(mask, query), scale=scale
        )

    def _backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return flash_for_cpu_backward(  # type: ignore[no-any-return]
            grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=_bias(mask, query), scale=scale
        )


class CudaFused(Kernel):
    """Calls torch's flash and memory-efficient attention on CUDA (checked by `prove` before use).

    Flash attention takes half precision without a mask. Memory-efficient attention takes the rest; it pads its
    log-sum-exp to multiples of 32 and needs the rows of its bias aligned to 16 elements.
    """

    multiple = 8

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if _flash(query, mask):
            found = flash(query, key, value, 0.0, causal, False, scale=scale)
        else:
            bias = _bias(mask, query, expand=True)
            found = efficient(query, key, value, bias, True, 0.0, causal, scale=scale)
        return found[0], found[1][..., : query.shape[2]]

    def _backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_seed = torch.zeros((), dtype=torch.int64, device=query.device)
        if _flash(query, mask):
            rows, columns = query.shape[2], key.shape[2]
            state = torch.zeros(2, dtype=torch.int64, device=query.device).view(torch.uint64)
            return flash_backward(  # type: ignore[no-any-return]
                *(grad_out, query, key, value, out, lse.contiguous(), None, None, rows, columns),
                *(0.0, causal, state, no_seed),
                scale=scale,
            )
        padded = F.pad(lse, (0, 0 if torch.version.hip else -lse.shape[-1] % 32), value=INF).contiguous()
        # The kernel assumes without a check that the output lies in memory as [B, Q, H, E].
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        dq, dk, dv, _ = efficient_backward(
            *(grad_out, query, key, value, _bias(mask, query, expand=True), out, padded, no_seed, no_seed),
            *(0.0, [True, True, True, False], causal),
            scale=scale,
        )
        return dq, dk, dv


def choose(query: Tensor, *, softcap: float | None, plain: bool) -> Kernel:
    """Return the kernel for queries of this device, dtype and head size."""
    if plain or softcap is not None:
        return Plain(softcap)
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return CpuFlash()
    if query.device.type == "cuda" and query.shape[-1] <= 256:
        return CudaFused()
    return Plain()


def prove(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise `PlanError` unless `kernel` agrees with `Plain` on random tensors of these head sizes.

    Compares with and without a mask. With the mask the kernel sees only part of the keys, while its backward pass gets
    the log-sum-exp of all of them.
    """
    length, repeats = 40, query.shape[1] // key.shape[1]
    generator = torch.Generator(query.device).manual_seed(0)

    def random(heads: int, like: Tensor) -> Tensor:
        shape = (1, heads, length, like.shape[-1])
        return torch.randn(shape, device=like.device, dtype=torch.float32, generator=generator).to(like.dtype)

    q, grad = random(repeats, query), random(repeats, value)
    k, v = random(1, key), random(1, value)
    scale, plain = query.shape[-1] ** -0.5, Plain()
    out, lse = plain.forward(q, k, v, scale=scale, causal=True, mask=None)
    out = out.to(q.dtype)
    rows = torch.arange(length, device=q.device)
    window = ((rows[:, None] - rows) % 16 < 8)[None, None]
    options: list[dict[str, Any]] = [
        {"causal": True, "mask": None},
        {"causal": False, "mask": window & (rows[:, None] >= rows)},
    ]
    limit = 1e-3 if q.dtype == torch.float32 else 5e-2
    for option in options:
        pairs = zip(
            (
                *kernel.forward(q, k, v, scale=scale, **option),
                *kernel.backward(grad, q, k, v, out, lse, scale=scale, **option),
            ),
            (
                *plain.forward(q, k, v, scale=scale, **option),
                *plain.backward(grad, q, k, v, out, lse, scale=scale, **option),
            ),
            strict=True,
        )
        for got, want in pairs:
            if not float((got - want).float().norm()) <= limit * float(want.float().norm()):
                raise PlanError(
                    f"{type(kernel).__name__} of torch {torch.__version__} computes wrong attention for {q.dtype} "
                    f'and head size {q.shape[-1]}; set model.attn = "eager" or cp.kind = "ulysses"'
                )


def _flash(query: Tensor, mask: Tensor | None) -> bool:
    return mask is None and query.dtype in (torch.bfloat16, torch.float16)


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bias(mask: Tensor | None, query: Tensor, *, expand: bool = False) -> Tensor | None:
    """Return `mask` as 0 and -inf in the dtype of `query`, expanded to `[B, H, Q, K]` if `expand`."""
    if mask is None:
        return None
    columns = mask.shape[-1]
    bias = torch.zeros((*mask.shape[:-1], columns + -columns % 16), dtype=query.dtype, device=query.device)
    bias = bias[..., :columns].masked_fill_(~mask, -INF)
    return bias.expand(query.shape[0], query.shape[1], -1, -1) if expand else bias
