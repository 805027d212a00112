"""Computes one optimizer step, independent of the data loader."""

from ndtrain.engine.engine import Batch, Engine

__all__ = ["Batch", "Engine"]
