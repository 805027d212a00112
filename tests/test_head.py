"""The loss inside the head: its value and gradients are those of torch's cross-entropy of the whole logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from ndtrain.data import IGNORE
from ndtrain.data.batches import target_rows
from ndtrain.engine import head
from tests.ranks import get_pool

TOKENS, WIDTH, VOCABULARY = 700, 24, 51


def case(dtype: torch.dtype, *, bias: bool) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(3)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::3] = IGNORE
    made = [torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)]
    hidden, weight, offset = (part.to(dtype).requires_grad_() for part in made)
    return {"hidden": hidden, "weight": weight, "bias": offset if bias else None, "labels": labels}


def wanted(dtype: torch.dtype, *, bias: bool) -> list[torch.Tensor]:
    """Loss and gradients of hidden states, weight and bias, of the whole float32 logits, all times a quarter."""
    of = case(dtype, bias=bias)
    hidden, weight = of["hidden"], of["weight"]
    assert hidden is not None and weight is not None and of["labels"] is not None
    logits = F.linear(hidden, weight, of["bias"]).float()
    loss = F.cross_entropy(logits, of["labels"], ignore_index=IGNORE, reduction="sum")
    (loss * 0.25).backward()
    return [loss.detach(), *(t.grad for t in (hidden, weight, of["bias"]) if t is not None and t.grad is not None)]


def found(dtype: torch.dtype, bias: bool) -> list[torch.Tensor]:
    """The same of `ChunkedLinear` on this rank's part of the vocabulary, the gradients put together."""
    of = case(dtype, bias=bias)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD if ranks > 1 else None
    linear = torch.nn.Linear(WIDTH, VOCABULARY, device="meta")
    part = head.Part.of(linear, group)
    hidden, labels = of["hidden"], of["labels"]
    own = [
        of[k].detach().chunk(ranks)[rank].requires_grad_() if of[k] is not None else None for k in ("weight", "bias")
    ]  # type: ignore[union-attr]
    assert hidden is not None and labels is not None
    loss = head.ChunkedLinear.apply(hidden, labels, torch.tensor(0.25), part, *own)
    loss.backward()
    with torch.no_grad():
        assert torch.allclose(loss, head.summed_loss(hidden, labels, part, *own))  # type: ignore[arg-type]
    grads = []
    for tensor in own:
        if tensor is not None:
            parts: list[torch.Tensor] = [tensor] * ranks
            dist.all_gather_object(parts, tensor.grad)
            grads.append(torch.cat(parts))
    assert hidden.grad is not None
    return [loss.detach(), hidden.grad, *grads]


def in_chunks(dtype: torch.dtype, bias: bool, bytes_: int) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_BYTES", bytes_)
        return found(dtype, bias)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "bias", "bytes_"),
    [(torch.float32, True, 1 << 30), (torch.float32, False, 4 * VOCABULARY * 37), (torch.bfloat16, True, 4096)],
)
def test_loss_and_gradients_are_those_of_the_whole_logits(
    ranks: int, dtype: torch.dtype, bias: bool, bytes_: int
) -> None:
    want = wanted(dtype, bias=bias)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for answer in get_pool(ranks).run(in_chunks, dtype, bias, bytes_):
        assert len(answer) == len(want)
        for ours, theirs in zip(answer, want, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).float().norm() <= limit * theirs.float().norm()


def test_a_chunk_has_at_most_its_bytes_and_one_row_at_least() -> None:
    assert head.chunk_rows(8192, 128_256) == (512 << 20) // (4 * 128_256)
    assert head.chunk_rows(8192, 1000) == 2048
    assert head.chunk_rows(128, 1000) >= 128
    assert head.chunk_rows(8192, 1 << 40) == 1


def test_rows_that_are_no_targets_are_named_before_the_device_sees_them() -> None:
    labels = np.full((4, 256), IGNORE)
    labels[1, 3:140] = 5
    targets = target_rows(labels)
    assert targets is not None and len(targets) == 256 and targets.tolist() == sorted(set(targets.tolist()))
    assert set(np.flatnonzero(labels.ravel() != IGNORE)) <= set(targets.tolist())
    assert target_rows(np.zeros((4, 256), dtype=np.int64)) is None
    filler = target_rows(np.full((4, 256), IGNORE))
    assert filler is not None and len(filler) == 128
