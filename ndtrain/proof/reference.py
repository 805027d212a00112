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

from ndtrain.layout import held_boxes, local_part
from ndtrain.plan import Plan
from ndtrain.torch_compat import tree_leaves, tree_map

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

    def differences(self, model: nn.Module, *, copies: int) -> Iterator[tuple[str, Tensor]]:
        """What differs in the blocks that ran, and by how much of its size; a collective of all ranks.

        `copies` is how many ranks put the same tokens through the model: gradients are the sum of theirs.
        """
        for name, call in self.calls.items():
            # A block that runs several times has the gradients of all its calls.
            if call.count != 1 or not call.learns():
                continue
            block, reference = model.get_submodule(name), self.blocks[name]
            self._fill(name, reference.train(block.training), block, call.outputs[0].device)
            args, kwargs = tree_map(_leaf, call.inputs)
            outputs = _floats(reference(*args, **kwargs))
            for ours, alone in zip(call.outputs, outputs, strict=True):
                yield f"what {name} gives", distance(ours, alone)
            if call.shares:
                reference.to("meta")
                continue
            of = [(out, grad) for out, grad in zip(outputs, call.output_grads, strict=True) if grad is not None]
            torch.autograd.backward([out for out, _ in of], [grad for _, grad in of])
            pairs = [
                (f"the gradient of what {name} takes", grad, fresh.grad)
                for grad, fresh in zip(call.input_grads, _floats((args, kwargs)), strict=True)
            ]
            for n, param in block.named_parameters():
                grad = None if param.grad is None else whole(param.grad) / copies
                pairs.append((f"the gradient of {name}.{n}", grad, reference.get_parameter(n).grad))
            both = [(what, ours, alone) for what, ours, alone in pairs if ours is not None and alone is not None]
            # What is zero in exact arithmetic differs by the rounding of what it is made of.
            rounding = 5e-2 if self.low_precision else 1e-4
            floor = rounding * max(float(alone.float().norm()) for _, _, alone in both)
            for what, ours, alone in both:
                yield what, distance(ours, alone, floor)
            reference.to("meta")

    def _fill(self, name: str, reference: nn.Module, block: nn.Module, device: torch.device) -> None:
        """Give the copy of block `name` its weights."""
        reference.to_empty(device=device)
        for n, buffer in block.named_buffers():
            reference.get_buffer(n).copy_(buffer)
        for n, param in block.named_parameters():
            own = reference.get_parameter(n)
            own.data, own.grad = whole(param.detach()).to(self.dtypes[f"{name}.{n}"]), None


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


def _leaf(x: Any) -> Any:
    """A copy of a float tensor that gathers its own gradient; anything else as it is."""
    return x.detach().clone().requires_grad_(x.requires_grad) if _is_float(x) else x
