"""Compare cut blocks with whole ones: a cut block must have the outputs and gradients of a whole one.

The model is run on noise before its weights are read, since its source cannot tell. A block is small beside the model,
so that each rank can hold one whole.
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

# Blocks with more parameters are not checked: experts of this size are cut by ep, whose dispatch no model changes.
MAX_PARAMETERS = 4e9


class ReferenceBlocks:
    """Hold a whole block of each kind, copied before the model is cut, and compare it with the cut one after a run."""

    def __init__(self, model: PreTrainedModel, plan: Plan):
        units = {unit.name: unit for unit in (*plan.units, plan.root)}
        self.dtypes = {p.fqn: getattr(torch, units[p.unit].param_dtype) for p in plan.params}
        self.low_precision = plan.low_precision
        # A copy lacks the casts of inputs and outputs that units inside a block make.
        casting = [name for unit in plan.units if unit.output_dtype for name in unit.modules]
        self.blocks: dict[str, nn.Module] = {}
        kinds = set()
        for name in plan.blocks:
            block = model.get_submodule(name)
            kind = (type(block), tuple((n, p.shape) for n, p in block.named_parameters()))
            if any(n.startswith(f"{name}.") for n in casting):
                continue
            if kind not in kinds and sum(p.numel() for p in block.parameters()) <= MAX_PARAMETERS:
                kinds.add(kind)
                self.blocks[name] = copy.deepcopy(block)
        self.calls: dict[str, _Call] = {}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the inputs and outputs of the cut blocks, and the gradients of both, while the model runs once."""
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
        """Yield (name, relative difference) of the outputs and gradients of the blocks that ran; collective.

        `copies` is how many ranks ran the model on the same tokens: gradients are the sum of theirs. The difference is
        NaN where it is above `limit` and means nothing: the whole block's own gradient changes as much when its inputs
        are rounded differently.
        """
        for name, call in self.calls.items():
            # A block that ran several times has the sum of their gradients, which no one call gives.
            if call.count != 1 or not call.has_gradients():
                continue
            block, reference = model.get_submodule(name), self.blocks[name]
            self._fill(name, reference.train(block.training), block, call.outputs[0].device)
            names = [n for n, _ in block.named_parameters()]
            outputs, alone = _run_alone(reference, names, call, call.inputs)
            for i, (ours, own) in enumerate(zip(call.outputs, outputs, strict=True)):
                yield f"the output of {name}{_number(i)}", distance(ours, own)
            if call.shares:
                reference.to("meta")
                continue
            grads = [None if p.grad is None else whole(p.grad) / copies for _, p in block.named_parameters()]
            what = [f"the input of {name}{_number(i)}" for i in range(len(call.input_grads))]
            what += [f"{name}.{n}" for n in names]
            compared = [
                (i, mine, own)
                for i, (mine, own) in enumerate(zip([*call.input_grads, *grads], alone, strict=True))
                if mine is not None and own is not None
            ]
            # A gradient that is zero in exact arithmetic differs by the rounding of its terms.
            rounding = 5e-2 if self.low_precision else 1e-4
            floor = rounding * max(float(own.float().norm()) for _, _, own in compared)
            found = [distance(mine, own, floor) for _, mine, own in compared]
            if not all(amount < limit for amount in found):
                again = _run_alone(reference, names, call, tree_map(_rounded, call.inputs))[1]
                for at, (i, _, own) in enumerate(compared):
                    other = again[i]
                    if not found[at] < limit and (other is None or not distance(other, own, floor) < limit / 2):
                        found[at] = torch.full_like(found[at], torch.nan)
            for (i, _, _), amount in zip(compared, found, strict=True):
                yield f"the gradient of {what[i]}", amount
            reference.to("meta")

    def _fill(self, name: str, reference: nn.Module, block: nn.Module, device: torch.device) -> None:
        """Copy the weights and buffers of block `name` to `reference`, whole and on `device`; collective."""
        reference.to_empty(device=device)
        for n, buffer in block.named_buffers():
            reference.get_buffer(n).copy_(buffer)
        for n, param in block.named_parameters():
            own = reference.get_parameter(n)
            own.data, own.grad = whole(param.detach()).to(self.dtypes[f"{name}.{n}"]), None


def _run_alone(
    reference: nn.Module, names: list[str], call: _Call, inputs: Any
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the outputs of a whole block, and the gradients of its float inputs and of the parameters `names`."""
    reference.zero_grad()
    args, kwargs = tree_map(_leaf, inputs)
    outputs = _floats(reference(*args, **kwargs))
    if not call.shares:
        of = [(out, grad) for out, grad in zip(outputs, call.output_grads, strict=True) if grad is not None]
        torch.autograd.backward([out for out, _ in of], [grad for _, grad in of])
    return outputs, [x.grad for x in (*_floats((args, kwargs)), *map(reference.get_parameter, names))]


def _number(i: int) -> str:
    """Return " (2)" for the second of several tensors, nothing for the first."""
    return f" ({i + 1})" if i else ""


class _Call:
    """Record a block's call: detached inputs and outputs, and the gradients of both.

    `shares` is True if the block was given an object that is no tensor or plain value.
    """

    def __init__(self) -> None:
        self.count = 0
        self.shares = False
        self.inputs: tuple[Any, Any] = ((), {})
        self.input_grads: list[Tensor | None] = []
        self.outputs: list[Tensor] = []
        self.output_grads: list[Tensor | None] = []

    def has_gradients(self) -> bool:
        return any(grad is not None for grad in self.output_grads)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.count += 1
        self.inputs = tree_map(_leaf, (args, kwargs))
        # Through an object that blocks share, a block gets gradients from others, which a copy alone does not.
        plain = (Tensor, tuple, bool, int, float, str, type(None))
        self.shares = not all(isinstance(x, plain) for x in (*args, *kwargs.values()))
        if self.shares:
            return args, kwargs
        inputs, self.input_grads = _with_grads_caught((args, kwargs))
        return inputs  # type: ignore[no-any-return]

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.outputs = [leaf.detach().clone() for leaf in _floats(output)]
        outputs, self.output_grads = _with_grads_caught(output)
        return outputs


def _with_grads_caught(tree: Any) -> tuple[Any, list[Tensor | None]]:
    """Return `tree` with copies of its float tensors, and a list that gets the gradient of each copy on backward."""
    caught: list[Tensor | None] = []

    def catch(x: Any) -> Any:
        if not _is_float(x):
            return x
        index = len(caught)
        caught.append(None)
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda grad: caught.__setitem__(index, grad))
        return x

    return tree_map(catch, tree), caught


def whole(tensor: Tensor) -> Tensor:
    """Return the global float32 tensor of a sharded one, on the device of its mesh; collective over all ranks."""
    local = local_part(tensor).to(tensor.device_mesh.device_type)  # type: ignore[attr-defined]
    full = torch.full(tensor.shape, -torch.inf, dtype=torch.float32, device=local.device)
    for box in held_boxes(tensor):
        full[box.inside] = local[box.local].float()
    dist.all_reduce(full, op=dist.ReduceOp.MAX)
    return full


def distance(ours: Tensor, alone: Tensor, floor: float = 0.0) -> Tensor:
    """Return the norm of the difference divided by the norm of `alone`, or by `floor` if that is larger."""
    difference: Tensor = (ours.detach().float() - alone.detach().float()).norm()
    return difference / max(float(alone.detach().float().norm()), floor, 1e-30)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if _is_float(leaf)]


def _rounded(x: Any) -> Any:
    """Return a float tensor rounded differently, as another order of sums would; anything else unchanged."""
    return x * (1 + torch.finfo(x.dtype).eps * torch.randn_like(x)) if _is_float(x) else x


def _leaf(x: Any) -> Any:
    """Return a copy of a float tensor that collects its own gradient; anything else unchanged."""
    return x.detach().clone().requires_grad_(x.requires_grad) if _is_float(x) else x
