"""The styles of tensor parallelism: what goes around the forward of a module whose parameters are this rank's parts.

FSDP gathers parameters as plain tensors (`apply_fsdp`), inputs and outputs are plain tensors, and what the ranks
exchange are functions with gradients (`ndtrain.parallel.exchange`), so that no DTensor is dispatched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ndtrain.errors import PlanError
from ndtrain.layout import chunk
from ndtrain.parallel.exchange import GatherFeatures, SplitFeatures, Sum, SumOfGradients, SumOfLastGradients
from ndtrain.plan.derive import features, is_conv1d
from ndtrain.torch_compat import put_parameter

Forward = Callable[..., Any]


class Around(NamedTuple):
    """What a style knows of its module: the ranks, and whether others gather its input or add up its output.

    With `given`, the gradients of the input are added up elsewhere; with `part`, the output is to be a part of a sum.
    With `kept`, what a product gives is needed once more in the backward pass, and not to be changed.
    """

    group: dist.ProcessGroup
    config: Any
    given: bool = False
    part: bool = False
    kept: bool = False


def colwise(module: nn.Module, around: Around) -> Forward:
    """Take a whole input, give this rank's features."""
    forward = _columns(module, around)
    return forward if around.given else _with_input_summed(forward, around.group, only_multiplies(module))


def colwise_gather_output(module: nn.Module, around: Around) -> Forward:
    """Take a whole input, give all features."""
    width, group = features(module)[1], around.group
    forward = colwise(module, around)
    return lambda x: GatherFeatures.apply(forward(x), width, group)


def rowwise(module: Any, around: Around) -> Forward:
    """Take this rank's features of an input, give the whole output, or with `part` this rank's part of the sum."""
    forward, group = _without_bias(module), around.group
    first = float(group.rank() == 0)

    def sum_up(x: Tensor) -> Tensor:
        out = forward(x)
        if not around.part:
            out = Sum.apply(out, group, not around.kept)
        if module.bias is not None:
            # One rank alone adds it to a sum.
            out = out + module.bias * first if around.part else out + module.bias
        return out

    return sum_up


def rowwise_split_input(module: nn.Module, around: Around) -> Forward:
    """Take a whole input, of which this rank needs its features, give the whole output."""
    forward, group = rowwise(module, around), around.group
    return lambda x: forward(SplitFeatures.apply(x, group))


def embedding_rowwise(module: nn.Module, around: Around) -> Forward:
    """Look up the ids that this rank has, and add up the ranks' embeddings."""
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise PlanError(
            f"mesh.tp cannot cut a {type(module).__name__} with max_norm, sparse or scale_grad_by_freq; set mesh.tp = 1"
        )
    forward = module.forward
    lookup = _Lookup(module, around.group)

    def look_up(*args: Any, **kwargs: Any) -> Any:
        with lookup:
            return forward(*args, **kwargs)

    return look_up


def packed_colwise(module: nn.Module, around: Around) -> Forward:
    """Take a whole input, give this rank's part of each of the packed outputs."""
    return module.forward if around.given else _with_input_summed(module.forward, around.group, only_multiplies(module))


def moe_tp_experts(module: nn.Module, around: Around) -> Forward:
    """Take whole hidden states and routes, give the sum of what the ranks' parts of all experts give."""
    forward, group = module.forward, around.group

    def experts(hidden: Tensor, *routing: Any, **kwargs: Any) -> Any:
        if len(routing) >= 2:
            index, weights, *more = routing
            routing = (index, SumOfGradients.apply(weights, group, False), *more)
        out = forward(SumOfGradients.apply(hidden, group, False), *routing, **kwargs)
        return None if out is None else Sum.apply(out, group, False)

    return experts


def mla_kv_a_proj(module: nn.Module, around: Around) -> Forward:
    """Give the whole output, whose last features (the rotary key) go to this rank's heads without a cut layer."""
    width = getattr(around.config, "qk_rope_head_dim", None)
    if width is None:
        raise PlanError(
            f"a {type(module).__name__} has style mla_kv_a_proj, but the model's config has no qk_rope_head_dim; "
            "set mesh.tp = 1"
        )
    forward, group = module.forward, around.group
    return lambda *args, **kwargs: SumOfLastGradients.apply(forward(*args, **kwargs), width, group)


def all_reduce(module: nn.Module, around: Around) -> Forward:
    """Add up the ranks' outputs."""
    forward, group = module.forward, around.group

    def summed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return None if out is None else Sum.apply(out, group, False)

    return summed


def unchanged(module: nn.Module, around: Around) -> Forward:
    """Take and give what the module does with its part of the parameters, or with whole ones."""
    return module.forward


STYLES: dict[str, Callable[[nn.Module, Around], Forward]] = {
    "colwise": colwise,
    "conv1d_colwise": colwise,
    "colwise_gather_output": colwise_gather_output,
    "conv1d_colwise_gather_output": colwise_gather_output,
    "rowwise": rowwise,
    "conv1d_rowwise": rowwise,
    "rowwise_split_input": rowwise_split_input,
    "embedding_rowwise": embedding_rowwise,
    "packed_colwise": packed_colwise,
    "packed_rowwise": unchanged,
    "moe_tp_experts": moe_tp_experts,
    "mla_kv_a_proj": mla_kv_a_proj,
    "all_reduce": all_reduce,
    "local_params": unchanged,
    "replicate": unchanged,
}


def only_multiplies(module: nn.Module) -> bool:
    """Return whether a module does no more with its input than to multiply its weight with it."""
    return is_conv1d(module) or (type(module).forward is nn.Linear.forward and "forward" not in vars(module))


def _with_input_summed(forward: Forward, group: dist.ProcessGroup, in_place: bool) -> Forward:
    return lambda x, *args, **kwargs: forward(SumOfGradients.apply(x, group, in_place), *args, **kwargs)


def _columns(module: Any, around: Around) -> Forward:
    """Return the forward of a linear layer on this rank's columns."""
    if is_conv1d(module):
        return lambda x: torch.matmul(x, module.weight) + module.bias  # its own forward knows its full width
    return module.forward


def _without_bias(module: Any) -> Forward:
    """Return the forward of a linear layer, less its bias."""
    if is_conv1d(module):
        return lambda x: torch.matmul(x, module.weight)
    if only_multiplies(module):
        return lambda x: F.linear(x, module.weight)
    forward = module.forward

    def hidden(x: Tensor) -> Tensor:
        bias = put_parameter(module, "bias", None)
        try:
            return forward(x)  # type: ignore[no-any-return]
        finally:
            put_parameter(module, "bias", bias)

    return hidden


class _Lookup(TorchFunctionMode):
    """Has lookups in the weight of an embedding take the ids that this rank has, and adds up the ranks' embeddings.

    A class may change the ids before its lookup and scale the embeddings after it.
    """

    def __init__(self, module: nn.Embedding, group: dist.ProcessGroup):
        super().__init__()
        self.module, self.group = module, group
        self.start, self.end = chunk(module.weight.shape[0], group.size(), group.rank())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lookup = self._own if func is F.embedding else func
        return lookup(*args, **(kwargs or {}))

    def _own(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **more: Any) -> Tensor:
        if weight is not self.module.weight:
            return F.embedding(input, weight, padding_idx, *rest, **more)
        if self.start == self.end:  # more ranks than parts of the vocabulary
            found = weight.new_zeros((*input.shape, weight.shape[1]))
            return Sum.apply(found, self.group, True)  # type: ignore[no-any-return]
        others = (input < self.start) | (input >= self.end)
        if padding_idx is not None:
            padding_idx = padding_idx - self.start if self.start <= padding_idx < self.end else None
        found = F.embedding((input - self.start).masked_fill(others, 0), weight, padding_idx)
        return Sum.apply(found.masked_fill(others.unsqueeze(-1), 0), self.group, True)  # type: ignore[no-any-return]
