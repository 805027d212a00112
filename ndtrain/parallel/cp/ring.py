"""Ring attention (arXiv:2310.01889): keys and values travel round the ranks; each rank attends from its own queries.

`visible` says which keys of a block each query sees, `kernels` computes the block's attention, and the parts of one
softmax are merged here by their log-sum-exp, forward and backward. Heads need not divide by cp, and key-value heads
travel once, however many query heads share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.errors import PlanError
from ndtrain.hf.attention import KNOWN
from ndtrain.hf.causal import Packed, causal_attention
from ndtrain.hf.compat import sdpa_mask
from ndtrain.parallel.cp import kernels, visible
from ndtrain.parallel.cp.interface import ContextParallel
from ndtrain.parallel.cp.kernels import Kernel
from ndtrain.parallel.cp.visible import CAUSAL, Documents, PairMask, Visible


def pass_on(buffer: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Send `buffer` to the next rank of `group`; the result waits for the previous rank's buffer, of the same shape."""
    rank, size = group.rank(), group.size()
    received = torch.empty_like(buffer)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, buffer, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
        ]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


class _RingAttention(torch.autograd.Function):
    """Attends from this rank's queries `[B, H, S/cp, D]` to the keys and values of all ranks; sinks `[H]` add a key."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        seen: Visible,
        kernel: Kernel,
        scale: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        rank, size = group.rank(), group.size()
        out = query.new_zeros((*query.shape[:3], value.shape[-1]), dtype=_accumulator(query))
        lse = out.new_full(query.shape[:3], -torch.inf)
        block = _pack(key, value)
        for step in range(size):
            arriving = pass_on(block, group) if step + 1 < size else None
            k, v = _unpack(block, key, value)
            for span in seen.spans((rank - step) % size):
                rows, queries, keys = span.rows, span.queries, span.keys
                part = kernel.forward(
                    *(query[rows, :, queries], k[rows, :, keys], v[rows, :, keys]),
                    scale=scale,
                    causal=span.causal,
                    mask=span.mask,
                )
                if span.first:
                    out[rows, :, queries], lse[rows, :, queries] = part
                else:
                    _merge(out[rows, :, queries], lse[rows, :, queries], *part)
            if arriving is not None:
                block = arriving()
        if sinks is not None:
            column = sinks.to(lse.dtype)[None, :, None]
            out *= torch.sigmoid(lse - column)[..., None]
            lse = torch.logaddexp(lse, column)
        result = out.to(query.dtype)
        # A query that sees nothing has no probabilities: exp(-inf - 0) = 0.
        lse.masked_fill_(lse == -torch.inf, 0)
        ctx.save_for_backward(query, key, value, sinks, result, lse)
        ctx.seen, ctx.kernel, ctx.scale, ctx.group = seen, kernel, scale, group
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, sinks, out, lse = ctx.saved_tensors
        group: dist.ProcessGroup = ctx.group
        rank, size = group.rank(), group.size()
        grad = grad.contiguous()
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        block, travelling = _pack(key, value), None
        for step in range(size):
            arriving = pass_on(block, group) if step + 1 < size else None
            k, v = _unpack(block, key, value)
            block_grad = torch.zeros_like(block, dtype=lse.dtype)
            grad_k, grad_v = _unpack(block_grad, key, value)
            for span in ctx.seen.spans((rank - step) % size):
                rows, queries, keys = span.rows, span.queries, span.keys
                dq, dk, dv = ctx.kernel.backward(
                    *(grad[rows, :, queries], query[rows, :, queries], k[rows, :, keys], v[rows, :, keys]),
                    *(out[rows, :, queries], lse[rows, :, queries]),
                    scale=ctx.scale,
                    causal=span.causal,
                    mask=span.mask,
                )
                grad_query[rows, :, queries] += dq
                grad_k[rows, :, keys] += dk
                grad_v[rows, :, keys] += dv
            # The gradients of a block follow it round the ring in float32 and are back on its rank after the last step.
            if travelling is not None:
                block_grad += travelling()
            travelling = pass_on(block_grad, group)
            if arriving is not None:
                block = arriving()
        assert travelling is not None
        grad_key, grad_value = _unpack(travelling(), key, value)
        grad_sinks = None
        if sinks is not None:
            # The sink's value is 0, so its score only takes weight from the other keys.
            weight = (sinks.to(lse.dtype)[None, :, None] - lse).exp()
            grad_sinks = -(weight * (grad.to(lse.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
        grads = grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
        return *grads, grad_sinks, None, None, None, None


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    seen: Visible,
    kernel: Kernel,
    scale: float,
    group: dist.ProcessGroup,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of queries `[B, H, S/cp, D]` to the keys `[B, G, S/cp, D]` and values of all ranks."""
    out: Tensor = _RingAttention.apply(query, key, value, sinks, seen, kernel, scale, group)
    return out


class Ring(ContextParallel):
    """Context parallelism that passes keys and values round the ring; works with any number of heads."""

    kind = "ring"

    def __init__(self, model: Any, group: dist.ProcessGroup):
        super().__init__(model, group)
        self._proven: set[tuple[Any, ...]] = set()

    def segments(self, rank: int) -> tuple[int, ...]:
        return visible.segments(rank, self.size)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        caller = type(module).__name__
        for name, given in kwargs.items():
            if name not in KNOWN and isinstance(given, Tensor) and given.ndim:
                raise PlanError(
                    f'{caller} passes {name} to its attention function, and cp.kind = "ring" cannot split it; '
                    f"{_OTHERWISE}"
                )
        if kwargs.get("dropout"):
            raise PlanError(
                f'{caller} drops attention weights, which cp.kind = "ring" does not support; set its dropout rate '
                f"to 0 or {_OTHERWISE}"
            )
        if not query.shape[2] == key.shape[2] == self._length() * 2:
            raise PlanError(
                f"{caller} attends from {query.shape[2]} queries to {key.shape[2]} keys, but cp.kind = "
                f'"ring" needs one query and one key for each token ({self._length() * 2} on this rank); {_OTHERWISE}'
            )
        softcap, scale = kwargs.get("softcap"), kwargs.get("scaling")
        kernel = kernels.choose(query, softcap=softcap, plain=self.base == "eager")
        self._prove(kernel, query, key, value)
        out = ring_attention(
            query,
            key,
            value,
            seen=self._seen(attention_mask, module, kwargs.get("is_causal")),
            kernel=kernel,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            group=self.group,
            sinks=kwargs.get("s_aux"),
        )
        return out.transpose(1, 2).contiguous()

    def mask(self, q_length: int, kv_length: int, **kwargs: Any) -> Tensor:
        """Return a stand-in without memory; the mask itself is made for one pair of segments at a time in `attend`."""
        device = kwargs.get("device", "cpu")
        stand_in = torch.ones((), dtype=torch.bool, device=device).expand(kwargs["batch_size"], 1, q_length, kv_length)
        stand_in.visible = self._visible(self._asked(kwargs), device)  # type: ignore[attr-defined]
        return stand_in

    def _asked(self, kwargs: dict[str, Any]) -> Documents | PairMask | Literal["full"]:
        """Return what mask a transformers mask function is asked for by these arguments."""
        assert self.positions is not None
        packed = None if self.documents is None else Packed(self.positions, self.documents)
        # Some types make masks that keep no documents apart.
        causal = causal_attention(kwargs, packed) or causal_attention(kwargs)
        if causal is not None:
            return Documents(self.bounds or [[0]], causal.window)
        # The conditions under which sdpa_mask makes no mask (transformers 5.23).
        local, padding = kwargs.get("local_size"), kwargs.get("attention_mask")
        if (padding is None or bool(padding.all())) and (local is None or local > self._length() * 2 * self.size):
            if kwargs.get("allow_is_causal_skip", True):
                return CAUSAL
            if kwargs.get("allow_is_bidirectional_skip", False):
                return "full"
        given = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}

        def make(query: int, key: int, length: int) -> Tensor:
            offsets = {"q_length": length, "kv_length": length, "q_offset": query, "kv_offset": key}
            return cast(Tensor, sdpa_mask(**{**given, **offsets}))

        return make

    def _visible(self, mask: Documents | PairMask | Literal["full"], device: torch.device | str) -> Visible:
        return Visible(mask, length=self._length(), rank=self.rank, cp=self.size, device=device)

    def _seen(self, mask: Tensor | None, module: nn.Module, is_causal: bool | None) -> Visible:
        if mask is not None:
            found: Visible | None = getattr(mask, "visible", None)
            if found is None:
                raise PlanError(
                    f"{type(module).__name__} changes its attention mask or makes its own, which "
                    f'cp.kind = "ring" cannot cut; {_OTHERWISE}'
                )
            return found
        if self.base not in ("sdpa", "eager"):
            raise PlanError(
                f"{type(module).__name__} calls its attention function without a mask, so that cp.kind = "
                f'"ring" cannot know which keys its queries see; {_OTHERWISE}'
            )
        causal = self.base == "sdpa" and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        return self._visible(CAUSAL if causal else "full", "cpu")

    def _length(self) -> int:
        """Return the tokens of a segment."""
        assert self.positions is not None
        return self.positions.shape[1] // (2 * self.size)

    def _prove(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> None:
        case = (type(kernel), query.dtype, query.shape[1] // key.shape[1], query.shape[-1], value.shape[-1])
        if not isinstance(kernel, kernels.Plain) and case not in self._proven:
            kernels.prove(kernel, query, key, value)
            self._proven.add(case)


_OTHERWISE = 'set cp.kind = "ulysses" or mesh.cp = 1'


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _pack(key: Tensor, value: Tensor) -> Tensor:
    """Return both in one flat buffer, to be sent as one message."""
    return torch.cat([key.reshape(-1), value.reshape(-1)])


def _unpack(flat: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of `flat` with the shapes of `key` and `value`."""
    return flat[: key.numel()].view(key.shape), flat[key.numel() :].view(value.shape)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge the softmax over further keys (`part`, `part_lse`) into `out` and `lse`, in place."""
    total = torch.logaddexp(lse, part_lse)
    # -inf less -inf is NaN where no key has been seen yet.
    kept, added = ((each - total).exp().nan_to_num(0.0) for each in (lse, part_lse))
    out.mul_(kept[..., None]).add_(part * added[..., None])
    lse.copy_(total)
