"""Copy the tensors of a checkpoint to host memory, so that training can go on while they are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ndtrain.checkpoint.tensors import Files
from ndtrain.layout import Ints

_ALIGNED_BYTES = 64


class Staging:
    """Hold one buffer in host memory, pinned if tensors are on a CUDA device, reused for every checkpoint."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, parts: Mapping[str, Files]) -> dict[str, Files]:
        """Return `parts` with every piece copied. The copies are complete on return and valid until the next call."""
        pieces = [piece for files in parts.values() for entries in files.values() for piece, _ in entries.values()]
        size = sum(_aligned_bytes(piece) for piece in pieces)
        on_cuda = any(piece.is_cuda for piece in pieces)
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old buffer before the new one is allocated
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda)
        end = 0

        def copy_of(piece: Tensor) -> Tensor:
            nonlocal end
            start, end = end, end + _aligned_bytes(piece)
            copy = self._buffer[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)
            return copy.copy_(piece, non_blocking=True)

        copies: dict[str, dict[str, dict[str, tuple[Tensor, Ints]]]] = {
            part: {
                name: {key: (copy_of(piece), offsets) for key, (piece, offsets) in entries.items()}
                for name, entries in files.items()
            }
            for part, files in parts.items()
        }
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return dict(copies)


def _aligned_bytes(piece: Tensor) -> int:
    return -(-piece.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
