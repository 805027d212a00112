"""What the server of the test ranks imports before it forks them: much that a first case would import in every rank."""

import functools
import importlib

import ndtrain.mesh

# Cases of one mesh share its process groups; before anything else takes the function from there.
ndtrain.mesh.build_mesh = functools.cache(ndtrain.mesh.build_mesh)

_KINDS = ("llama", "qwen3", "gemma3", "gpt2", "phi3", "qwen3_moe", "mixtral", "gpt_oss")
for _name in (
    "ndtrain.train",
    "numpy.random",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor.parallel",
    "transformers.distributed.tensor_parallel",
    "transformers.distributed.expert_parallel",
    "transformers.integrations",
    "transformers.masking_utils",
    *(f"transformers.models.{kind}.modeling_{kind}" for kind in _KINDS),
):
    importlib.import_module(_name)
