"""Proof of tensor parallelism, block by block: what a cut block gives and learns is what the whole block does.

Asked of the model itself on noise before its weights are read, since no reading of the source can tell. A block is
small beside the model, so that each rank can hold one whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ndtrain.layout import held_boxes, local_part
from ndtrain.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A larger block is not proven: experts of this size are cut by ep, whose dispatch is the same for every model.
MOST = 4e9


class ReferenceBlocks:
    """One block of each kind, whole: copied before the model is cut, compared with the cut one after it has run."""

    def __init__(self, model: PreTrainedModel, plan: Plan):
        units = {unit.name: unit for unit in (*plan.units, plan.root)}
        self.dtypes = {p.fqn: getattr(torch, units[p.unit].param_dtype) for p in plan.params}
        self.low_precision = plan.low_precision
        # Units that cast what they take and give, inside a block, are not in a copy of it.
        casting = [name for unit in plan.units if unit.output_dtype for name in unit.modules]
        self.blocks: dict[str, nn.Module] = {}
        kinds = set()
        for name in plan.blocks:
            block = model.get_submodule(name)
            kind = (type(block), tuple((n, p.shape) for n, p in block.named_parameters()))
            if any(n.startswith(f"{name}.") for n in casting):
                continue
            if kind not in kinds and sum(p.numel() for p in block.parameters()) <= MOST:
                kinds.add(kind)
                self.blocks[name] = copy.deepcopy(block)
        self.calls: dict[str, _Call] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Remember what the cut blocks take and give, and the gradients of both, while the model runs once."""
        self.calls = {name: _Call() for name in self.blocks}
        hooks: list[Any] = []
        for name, call in self.calls.items():
            block = model.get_submodule(name)
            hooks.append(block.register_forward_pre_hook(call.before, with_kwargs=True))
            hooks.append(block.register_forward_hook(call.after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def differences(self, model: nn.Module, *, copies: int, limit: float) -> Iterator[tuple[str, Tensor]]:
        """What differs in the blocks that ran, and by how much of its size; a collective of all ranks.

        `copies` is how many ranks put the same tokens through the model: gradients are the sum of theirs. NaN stands
        for a difference above `limit` that means nothing, since the whole block alone has one of that size as soon as
        what it takes is rounded otherwise.
        """
        for name, call in self.calls.items():
            # A block that runs several times has the gradients of all its calls.
            if call.count != 1 or not call.learns():
                continue
            block, reference = model.get_submodule(name), self.blocks[name]
            self._fill(name, reference.train(block.training), block, call.outputs[0].device)
            names = [n for n, _ in block.named_parameters()]
            outputs, alone = _alone(reference, names, call, call.inputs)
            for i, (ours, own) in enumerate(zip(call.outputs, outputs, strict=True)):
                yield f"what {name} gives{_number(i)}", distance(ours, own)
            if call.shares:
                reference.to("meta")
                continue
            grads = [None if p.grad is None else whole(p.grad) / copies for _, p in block.named_parameters()]
            what = [f"what {name} takes{_number(i)}" for i in range(len(call.input_grads))]
            what += [f"{name}.{n}" for n in names]
            both = [
                (i, mine, own)
                for i, (mine, own) in enumerate(zip([*call.input_grads, *grads], alone, strict=True))
                if mine is not None and own is not None
            ]
            # What is zero in exact arithmetic differs by the rounding of what it is made of.
            rounding = 5e-2 if self.low_precision else 1e-4
            floor = rounding * max(float(own.float().norm()) for _, _, own in both)
            found = [distance(mine, own, floor) for _, mine, own in both]
            if not all(amount < limit for amount in found):
                again = _alone(reference, names, call, tree_map(_rounded, call.inputs))[1]
                for at, (i, _, own) in enumerate(both):
                    other = again[i]
                    if not found[at] < limit and (other is None or not distance(other, own, floor) < limit / 2):
                        found[at] = torch.full_like(found[at], torch.nan)
            for (i, _, _), amount in zip(both, found, strict=True):
                yield f"the gradient of {what[i]}", amount
            reference.to("meta")

    def _fill(self, name: str, reference: nn.Module, block: nn.Module, device: torch.device) -> None:
        """Give the copy of block `name` its weights."""
        reference.to_empty(device=device)
        for n, buffer in block.named_buffers():
            reference.get_buffer(n).copy_(buffer)
        for n, param in block.named_parameters():
            own = reference.get_parameter(n)
            own.data, own.grad = whole(param.detach()).to(self.dtypes[f"{name}.{n}"]), None


def _alone(
    reference: nn.Module, names: list[str], call: _Call, inputs: Any
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What a whole block gives for `inputs`, and the gradients of the float ones and of the parameters `names`."""
    reference.zero_grad()
    args, kwargs = tree_map(_leaf, inputs)
    outputs = _floats(reference(*args, **kwargs))
    if not call.shares:
        of = [(out, grad) for out, grad in zip(outputs, call.output_grads, strict=True) if grad is not None]
        torch.autograd.backward([out for out, _ in of], [grad for _, grad in of])
    return outputs, [x.grad for x in (*_floats((args, kwargs)), *map(reference.get_parameter, names))]


def _number(i: int) -> str:
    return f" ({i + 1})" if i else ""


class _Call:
    """A block's call: detached inputs and outputs, and the gradients of both."""

    def __init__(self) -> None:
        self.count = 0
        self.shares = False
        self.inputs: tuple[Any, Any] = ((), {})
        self.input_grads: list[Tensor | None] = []
        self.outputs: list[Tensor] = []
        self.output_grads: list[Tensor | None] = []

    def learns(self) -> bool:
        return any(grad is not None for grad in self.output_grads)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.count += 1
        self.inputs = tree_map(_leaf, (args, kwargs))
        # What blocks share in an object of their own brings gradients to them that a copy alone does not get.
        plain = (Tensor, tuple, bool, int, float, str, type(None))
        self.shares = not all(isinstance(x, plain) for x in (*args, *kwargs.values()))
        if self.shares:
            return args, kwargs
        given, self.input_grads = _with_grads_caught((args, kwargs))
        return given  # type: ignore[no-any-return]

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.outputs = [leaf.detach().clone() for leaf in _floats(output)]
        given, self.output_grads = _with_grads_caught(output)
        return given


def _with_grads_caught(tree: Any) -> tuple[Any, list[Tensor | None]]:
    """`tree` with copies of its float tensors, and one place for each, which gets the gradient of that copy."""
    caught: list[Tensor | None] = []

    def catch(x: Any) -> Any:
        if not _is_float(x):
            return x
        at = len(caught)
        caught.append(None)
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda grad: caught.__setitem__(at, grad))
        return x

    return tree_map(catch, tree), caught


def whole(tensor: Tensor) -> Tensor:
    """The global float32 tensor of a sharded one, on the device; a collective of all ranks."""
    local = local_part(tensor).to(tensor.device_mesh.device_type)  # type: ignore[attr-defined]
    full = torch.full(tensor.shape, -torch.inf, dtype=torch.float32, device=local.device)
    for box in held_boxes(tensor):
        full[box.inside] = local[box.local].float()
    dist.all_reduce(full, op=dist.ReduceOp.MAX)
    return full


def distance(ours: Tensor, alone: Tensor, floor: float = 0.0) -> Tensor:
    """Norm of the difference over that of `alone`, or over `floor` where that is larger."""
    difference: Tensor = (ours.detach().float() - alone.detach().float()).norm()
    return difference / max(float(alone.detach().float().norm()), floor, 1e-30)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if _is_float(leaf)]


def _rounded(x: Any) -> Any:
    """What another order of sums would have made of a float tensor."""
    return x * (1 + torch.finfo(x.dtype).eps * torch.randn_like(x)) if _is_float(x) else x


def _leaf(x: Any) -> Any:
    """A copy of a float tensor that gathers its own gradient; anything else as it is."""
    return x.detach().clone().requires_grad_(x.requires_grad) if _is_float(x) else x
