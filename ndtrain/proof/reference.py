"""Compare the parts of a model on its mesh with the same parts alone: equal outputs and gradients.

The model is run on noise before its weights are read, since its source cannot tell. The part alone gets what the part
on the mesh got, so that rounding does not add up over the layers, and gathers one parameter at a time.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ndtrain.layout import held_boxes, local_part
from ndtrain.plan import Plan
from ndtrain.plan.names import is_within
from ndtrain.proof.lazy import LazyParameter, Recent
from ndtrain.torch_compat import put_parameter, tree_leaves, tree_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A gradient that is zero in exact arithmetic differs by the rounding of its terms, a share of the largest gradient.
_ROUNDING = 1e-4


class References:
    """Hold each part of a model as it was before the model was cut, on meta, to compare the cut one with.

    Parts are the blocks, and the modules outside them with parameters of their own (embeddings, norms, head).
    """

    def __init__(self, model: PreTrainedModel, plan: Plan):
        outside = [
            name
            for name, module in model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
            and not is_within(name, plan.blocks)
            and not any(is_within(block, [name]) for block in plan.blocks)
        ]
        outside = [name for name in outside if not any(name != other and is_within(name, [other]) for other in outside)]
        whole = [
            name for name in outside if name and _is_given_whole(model.get_submodule(name), plan.tp_rules.get(name))
        ]
        self.parts = {name: copy.deepcopy(model.get_submodule(name)) for name in (*plan.blocks, *whole)}
        uses = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
        # The gradient of a parameter that several parts share is the sum of theirs.
        self._shared = {
            name for name, param in model.named_parameters(remove_duplicate=False) if uses[id(param)] > 1
        } | {*plan.tied, *plan.tied.values()}
        self.calls: dict[str, _Call] = {}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the inputs and outputs of the cut parts, and the gradients of both, while the model runs once."""
        self.calls = {name: _Call() for name in self.parts}
        hooks: list[Any] = []
        for name, call in self.calls.items():
            part = model.get_submodule(name)
            hooks.append(part.register_forward_pre_hook(call.before, with_kwargs=True))
            hooks.append(part.register_forward_hook(call.after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def differences(self, model: nn.Module, *, copies: int, limit: float) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, relative difference) of the outputs and gradients of the parts that ran; collective.

        `copies` is how many ranks ran the model on the same tokens: gradients are the sum of theirs. The difference is
        NaN where it is above `limit` and means nothing: the part's own gradient alone changes as much when its inputs
        are rounded differently.
        """
        for name, call in self.calls.items():
            # A part that ran several times has the sum of their gradients, which no one call gives.
            if call.count != 1 or not call.has_gradients():
                continue
            call.share()
            yield from self._differences(name, call, model.get_submodule(name), copies=copies, limit=limit)
            call.forget()

    def _differences(
        self, name: str, call: _Call, part: nn.Module, *, copies: int, limit: float
    ) -> Iterator[tuple[str, Tensor]]:
        ours = {
            leaf: param.grad
            for leaf, param in part.named_parameters()
            if param.grad is not None and f"{name}.{leaf}" not in self._shared
        }
        found: dict[str, _Distance] = {}

        def compare(what: str, mine: Tensor | None, alone: Tensor | None) -> None:
            if mine is not None and alone is not None:
                found[what] = _Distance.of(mine, alone)

        def compare_leaf(leaf: str, alone: Tensor) -> None:
            if leaf in ours:
                compare(f"{name}.{leaf}", whole(ours[leaf]) / copies, alone)

        alone = self._run(name, call, part, call.inputs, compare_leaf)
        for i, (mine, own) in enumerate(zip(call.outputs, alone.outputs, strict=True)):
            yield f"the output of {name}{_number(i)}", _Distance.of(mine, own).relative()
        if call.shares:
            return
        for i, (given, own_grad) in enumerate(zip(call.input_grads, alone.input_grads, strict=True)):
            compare(f"the input of {name}{_number(i)}", given, own_grad)
        floor = _ROUNDING * max((float(distance.size) for distance in found.values()), default=0.0)
        differ = {what: distance.relative(floor) for what, distance in found.items()}
        wrong = [what for what, amount in differ.items() if not amount < limit]
        for what in self._meaningless(name, call, part, wrong, floor, limit) if wrong else ():
            differ[what] = torch.full_like(differ[what], torch.nan)
        for what, amount in differ.items():
            yield f"the gradient of {what}", amount

    def _meaningless(
        self, name: str, call: _Call, part: nn.Module, wrong: list[str], floor: float, limit: float
    ) -> Iterator[str]:
        """Yield those of the gradients `wrong` that change as much when the part's inputs are rounded differently."""
        runs: list[dict[str, Tensor]] = []
        for inputs in (call.inputs, tree_map(_rounded, call.inputs)):
            kept: dict[str, Tensor] = {}

            def keep(leaf: str, grad: Tensor, kept: dict[str, Tensor] = kept) -> None:
                if f"{name}.{leaf}" in wrong:
                    kept[f"{name}.{leaf}"] = grad.clone()

            alone = self._run(name, call, part, inputs, keep)
            for i, grad in enumerate(alone.input_grads):
                if grad is not None:
                    kept[f"the input of {name}{_number(i)}"] = grad
            runs.append(kept)
        own, other = runs
        for what in wrong:
            if what not in other or not distance(other[what], own[what], floor) < limit / 2:
                yield what

    def _run(self, name: str, call: _Call, part: nn.Module, inputs: Any, leaf: Any) -> _Alone:
        """Run a part alone, with the values of the cut `part`; `leaf(name, gradient)` is called for each parameter."""
        reference = self.parts[name].train(part.training)
        device = call.outputs[0].device
        sizes = [param.numel() for param in reference.parameters()]
        recent = Recent(2 * max(sizes, default=0))
        kept = dict(reference.named_buffers())
        for n, buffer in part.named_buffers():
            owner, _, own = n.rpartition(".")
            setattr(reference.get_submodule(owner), own, buffer.clone())
        before: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        cut, lazies = dict(part.named_parameters()), {}

        def lazy_of(n: str, param: nn.Parameter) -> LazyParameter:
            def gather() -> Tensor:
                return recent.get(n, param.numel(), lambda: whole(cut[n].detach()))

            def arrived(lazy: Tensor) -> None:
                assert lazy.grad is not None
                leaf(n, lazy.grad)
                lazy.grad = None

            lazy = LazyParameter(param, gather, device=device, requires_grad=param.requires_grad)
            if param.requires_grad:
                lazy.register_post_accumulate_grad_hook(arrived)
            return lazy

        for n, param in [*reference.named_parameters(remove_duplicate=False)]:
            owner, _, own = n.rpartition(".")
            if param not in lazies:
                lazies[param] = lazy_of(n, param)
            module = reference.get_submodule(owner)
            before.append((module, own, put_parameter(module, own, lazies[param])))  # type: ignore[arg-type]
        try:
            args, kwargs = tree_map(_leaf, inputs)
            outputs = _floats(reference(*args, **kwargs))
            if not call.shares:
                of = [(out, grad) for out, grad in zip(outputs, call.output_grads, strict=True) if grad is not None]
                torch.autograd.backward([out for out, _ in of], [grad for _, grad in of])
        finally:
            for module, own, was in before:
                put_parameter(module, own, was)
            for n, buffer in kept.items():
                owner, _, own = n.rpartition(".")
                setattr(reference.get_submodule(owner), own, buffer)
        return _Alone([out.detach() for out in outputs], [x.grad for x in _floats((args, kwargs))])


def _is_given_whole(module: nn.Module, style: str | None) -> bool:
    """Return whether a module that tp cuts by `style` takes and gives whole activations."""
    return style is None or isinstance(module, nn.Embedding) or style.endswith("gather_output")


class _Alone(NamedTuple):
    """What a part gave alone: its outputs, and the gradients of its float inputs."""

    outputs: list[Tensor]
    input_grads: list[Tensor | None]


class _Distance(NamedTuple):
    """The norm of a difference, and that of what it is measured against."""

    difference: Tensor
    size: Tensor

    @classmethod
    def of(cls, ours: Tensor, alone: Tensor) -> _Distance:
        ours, alone = ours.detach().float(), alone.detach().float()
        return cls((ours - alone).norm(), alone.norm())

    def relative(self, floor: float = 0.0) -> Tensor:
        return self.difference / max(float(self.size), floor, 1e-30)


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

    def share(self) -> None:
        """Take rank 0's inputs and gradients, so that every rank runs the same operations; collective."""
        self.inputs = tree_map(_of_rank0, self.inputs)
        self.output_grads = [_of_rank0(grad) for grad in self.output_grads]

    def forget(self) -> None:
        self.inputs, self.input_grads, self.outputs, self.output_grads = ((), {}), [], [], []

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
        if x.requires_grad:  # not in code that runs without gradients, as reversible layers do
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
    return _Distance.of(ours, alone).relative(floor)


def _of_rank0(x: Any) -> Any:
    """Return rank 0's values of a float tensor; anything else unchanged. Collective."""
    if not _is_float(x):
        return x
    same = x.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(same, 0)
    return same.requires_grad_(x.requires_grad)


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
