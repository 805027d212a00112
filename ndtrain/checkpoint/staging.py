"""Copy the tensors of a checkpoint to host memory, so that training can go on while they are written."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ndtrain.checkpoint.tensors import Files
from ndtrain.layout import Ints

_ALIGNED_BYTES = 64


class Staging:
    """Hold one buffer in host memory, pinned if tensors are on a CUDA device, reused for every checkpoint."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._unpin: weakref.finalize[..., Staging] | None = None

    def reserve(self, parts: Mapping[str, Files]) -> None:
        """Take the memory that `copy` needs for pieces like those of `parts`, unless there is enough."""
        size = sum(_aligned_bytes(piece) for piece in _pieces(parts))
        if self.buffer.numel() >= size:
            return
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self.buffer = torch.empty(0, dtype=torch.uint8)  # free the old buffer before the new one is allocated
        self.buffer = torch.empty(size, dtype=torch.uint8)
        if any(piece.is_cuda for piece in _pieces(parts)):
            # Not `pin_memory`, whose allocator takes the next power of two.
            runtime, address = torch.cuda.cudart(), self.buffer.data_ptr()
            torch.cuda.check_error(runtime.cudaHostRegister(address, size, 0))
            self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, address)

    def copy(self, parts: Mapping[str, Files]) -> dict[str, Files]:
        """Return `parts` with every piece copied. The copies are complete on return and valid until the next call."""
        self.reserve(parts)
        end = 0

        def copy_of(piece: Tensor) -> Tensor:
            nonlocal end
            start, end = end, end + _aligned_bytes(piece)
            copy = self.buffer[start : start + piece.nbytes].view(piece.dtype).view(piece.shape)
            return copy.copy_(piece, non_blocking=True)

        copies: dict[str, dict[str, dict[str, tuple[Tensor, Ints]]]] = {
            part: {
                name: {key: (copy_of(piece), offsets) for key, (piece, offsets) in entries.items()}
                for name, entries in files.items()
            }
            for part, files in parts.items()
        }
        if any(piece.is_cuda for piece in _pieces(parts)):
            torch.cuda.current_stream().synchronize()
        return dict(copies)


def _pieces(parts: Mapping[str, Files]) -> Iterator[Tensor]:
    for files in parts.values():
        for entries in files.values():
            for piece, _ in entries.values():
                yield piece


def _aligned_bytes(piece: Tensor) -> int:
    return -(-piece.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
