"""What one optimizer step computes, whatever feeds it."""

from ndtrain.engine.engine import Batch, Engine

__all__ = ["Batch", "Engine"]
