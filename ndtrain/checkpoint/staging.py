"""Copies in host memory of what a checkpoint holds, so that training can go on while they are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ndtrain.checkpoint.tensors import Files
from ndtrain.layout import Ints

_ALIGNED_BYTES = 64


class Staging:
    """One buffer in host memory, pinned for tensors on a CUDA device, used again for every checkpoint."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def hold(self, parts: Mapping[str, Files]) -> dict[str, Files]:
        """`parts` with every piece copied; the copies are whole when this returns, and hold until the next call."""
        pieces = [piece for files in parts.values() for entries in files.values() for piece, _ in entries.values()]
        size = sum(_room(piece) for piece in pieces)
        on_cuda = any(piece.is_cuda for piece in pieces)
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda)
        end = 0

        def copied(piece: Tensor) -> Tensor:
            nonlocal end
            start, end = end, end + _room(piece)
            copy = self._buffer[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)
            return copy.copy_(piece, non_blocking=True)

        held: dict[str, dict[str, dict[str, tuple[Tensor, Ints]]]] = {
            part: {
                name: {key: (copied(piece), offsets) for key, (piece, offsets) in entries.items()}
                for name, entries in files.items()
            }
            for part, files in parts.items()
        }
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return dict(held)


def _room(piece: Tensor) -> int:
    return -(-piece.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
