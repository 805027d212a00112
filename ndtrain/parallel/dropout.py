"""Dropout under tensor parallelism.

The ranks of a tp group draw the same random numbers, which is right for activations that all of them hold whole. An
activation that is split over them needs different numbers on each rank; the attention function, which works on a rank's
own heads, gets those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ndtrain.hf.attention_functions import own_attention, take_attention
from ndtrain.hf.compat import ALL_MASK_ATTENTION_FUNCTIONS, attention_name
from ndtrain.mesh import Meshes
from ndtrain.plan import Plan
from ndtrain.runs.seeds import random_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generator_of(device: torch.device) -> torch.Generator:
    """Return the default random generator of `device`."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextmanager
def random_numbers_of(device: torch.device, rank: int) -> Iterator[None]:
    """Draw random numbers of `rank` alone inside; afterwards every rank continues with the shared ones.

    The seed comes from a number that the CPUs of all ranks draw alike, so a block that is recomputed from the
    generators' old states drops the same elements again.
    """
    seed = int(torch.randint(2**62, ()))
    generator = generator_of(device)
    state = generator.get_state()
    generator.manual_seed(random_seed(seed, rank))
    try:
        yield
    finally:
        generator.set_state(state)


def apply_dropout_by_rank(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Make the attention of `model` draw random numbers of this tp rank alone where the rank has heads of its own.

    Where projections are gathered, every rank has all heads and must drop the same elements.
    """
    rank = meshes.tp.get_local_rank()
    base = str(attention_name(model.config))
    cut = {model.get_submodule(name.rpartition(".")[0]) for name, style in plan.tp_rules.items() if style == "colwise"}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        attend = own_attention(base, module)
        if module not in cut or not kwargs.get("dropout"):
            return attend(module, query, key, value, attention_mask, **kwargs)
        with random_numbers_of(query.device, rank):
            return attend(module, query, key, value, attention_mask, **kwargs)

    take_attention(model, attention, ALL_MASK_ATTENTION_FUNCTIONS[base])
