"""Save and load checkpoints: tensors of any sharding as safetensors, published complete or not at all. No pickle."""

from ndtrain.checkpoint.store import CheckpointStore, check, read_state
from ndtrain.checkpoint.tensors import load_tensors

__all__ = ["CheckpointStore", "check", "load_tensors", "read_state"]
