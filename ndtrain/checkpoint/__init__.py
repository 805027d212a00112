"""Checkpoints: tensors of any sharding as safetensors, published whole or not at all. Nothing is pickled."""

from ndtrain.checkpoint.store import CheckpointStore, check, read_state
from ndtrain.checkpoint.tensors import load_tensors

__all__ = ["CheckpointStore", "check", "load_tensors", "read_state"]
