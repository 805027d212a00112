"""Save and load checkpoints: tensors of any sharding as safetensors, published complete or not at all. No pickle."""

from ndtrain.checkpoint.store import CheckpointStore, check, check_together, read_state
from ndtrain.checkpoint.tensors import load_tensors

__all__ = ["CheckpointStore", "check", "check_together", "load_tensors", "read_state"]
