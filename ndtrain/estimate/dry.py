"""Run one training step with the code that `run` uses, on tensors without data and on simulated ranks.

`FakeTensorMode` gives tensors shapes but no memory. torch's fake process group has any number of ranks, and its
collectives do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ndtrain.data.batches import micro_batches
from ndtrain.engine import head
from ndtrain.engine.engine import Engine
from ndtrain.errors import NdtrainError, PlanError, one_line
from ndtrain.estimate import record
from ndtrain.estimate.record import Record, Recorder
from ndtrain.hf.compat import dispatch_wrapped, documents_found_by, find_packed_sequence_indices, grouped_mm_wrapped
from ndtrain.hf.model import tie
from ndtrain.hf.positions import fix_frequencies
from ndtrain.mesh import Meshes
from ndtrain.parallel import fused, recompute
from ndtrain.parallel.cp import kernels
from ndtrain.parallel.cp.visible import CAUSAL, Visible
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe
from ndtrain.torch_compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeStore,
    FakeTensor,
    FakeTensorMode,
    apply_to_tensors,
    forget_shardings,
    fsdp_name,
    fsdp_stages_wrapped,
    give_collectives_shapes,
    shape_propagation_wrapped,
    sharded_parameters,
    unsharded_parameters,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dry_step(recipe: Recipe, plan: Plan, model: PreTrainedModel, *, rank: int, on_cuda: bool) -> Record:
    """Record what `rank` does in one optimizer step after the first. `model` (on meta) is sharded: do not reuse it.

    Tokens are spread evenly over experts. With `on_cuda` attention takes the kernels of such a device, and each packed
    row is one document. Raises `PlanError` for a model whose shapes depend on tensors' values.
    """
    if dist.is_initialized():
        raise NdtrainError("a dry step needs a process without a process group, since it starts its own")
    dist.init_process_group("fake", rank=rank, world_size=plan.sizes.world_size, store=FakeStore())
    try:
        give_collectives_shapes()
        # DTensor remembers the placements of results with a mesh. An equal mesh of an earlier dry step has groups of
        # other names, which are gone or are other groups now.
        forget_shardings()
        # No step depends on how many there are.
        recipe = recipe.with_steps(recipe.train.steps or 1)
        engine = Engine(recipe, plan, model, device=torch.device("cpu"), kernels_of="cuda" if on_cuda else "cpu")
        engine.cut()
        fix_frequencies(model, None)
        recorder = Recorder(axes(engine.meshes))
        try:
            with (
                FakeTensorMode(allow_non_fake_inputs=True),
                recorder,
                watched(recorder),
                without_data(plan, packing=bool(recipe.data.packing)),
            ):
                loaded = batches(recipe, plan)
                if on_cuda and engine.marks_documents:
                    loaded = [{**batch, "documents": batch["input_ids"][:, :0]} for batch in loaded]
                run_step(engine, recorder, loaded)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise PlanError(
                f"{plan.model_type} cannot be run on tensors without data: it needs the values that {error} returns; "
                "leave out --dry-run, --device, --html and --suggest"
            ) from error
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if not recipe.tp.plan and not recipe.ep.plan:
                raise
            raise PlanError(
                f"{plan.model_type} does not run on {plan.sizes.describe()} with this [tp.plan] or [ep.plan]: "
                f"{one_line(error)}; correct it"
            ) from error
        return recorder.record
    finally:
        dist.destroy_process_group()


def run_step(engine: Engine, recorder: Recorder, loaded: list[dict[str, Tensor]]) -> None:
    """Make the parameters and the optimizer state, then record the engine's second step."""
    model, plan = engine.model, engine.plan
    with recorder.making(record.PARAMETERS):
        apply_to_tensors(model, lambda tensor: torch.empty_like(tensor, device="cpu"))
        tie(model)
    engine.finish()
    named = dict(model.named_parameters())
    for param in named.values():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    with recorder.making(record.OPTIMIZER):
        engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    hosted = [named[fqn] for fqn in plan.on_host]
    recorder.label(hosted, record.HOST)
    for param in hosted:
        recorder.label((t for t in engine.optimizer.state[param].values() if isinstance(t, Tensor)), record.HOST)
    model.train()
    recorder.restart()
    rows = engine.recipe.train.global_batch_size
    # The micro batches between the first and the last are alike: run one and count it for all.
    ahead = iter([max(1, len(loaded) - 2), 1, 1])

    def done() -> None:
        recorder.times = next(ahead)

    counts = torch.tensor([rows * engine.recipe.data.seq_len, rows])
    engine.gradients(loaded[:3], counts=counts, done=done)
    recorder.stage = ("update", "")
    engine.clip()
    engine.update(0, skip=torch.zeros(()))


def batches(recipe: Recipe, plan: Plan) -> list[dict[str, Tensor]]:
    """Return the micro batches of a rank, every token a target; fake tensors if made inside a fake mode."""
    train, length = recipe.train, recipe.data.seq_len
    rows, steps = micro_batches(train.global_batch_size, plan.sizes.batch, train.micro_batch_size)
    shape = (rows, length)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.zeros(shape, dtype=torch.int64),
        "position_ids": torch.arange(length).repeat(rows, 1),
    }
    return [dict(batch) for _ in range(steps)]


def axes(meshes: Meshes) -> dict[str, str]:
    """Return {name of a process group: mesh axis}."""
    found = {dist.group.WORLD.group_name: "world", meshes.loss.get_group().group_name: "loss"}  # type: ignore[union-attr]
    for mesh in (meshes.dense, meshes.train, meshes.expert):
        if mesh is not None:
            found |= {mesh[axis].get_group().group_name: axis for axis in mesh.mesh_dim_names or ()}
    return found


@contextmanager
def watched(recorder: Recorder) -> Iterator[None]:
    """Label FSDP's buffers, the loss's logits and the gradients for the recorder."""
    hooked: set[Tensor] = set()

    def stage(direction: str) -> Callable[[Any], None]:
        def enter(group: Any) -> None:
            recorder.stage = (direction, fsdp_name(group))

        return enter

    def hook(group: Any) -> None:
        for whole in unsharded_parameters(group):
            if whole.requires_grad and whole not in hooked:
                hooked.add(whole)
                whole.register_post_accumulate_grad_hook(lambda p: recorder.label([p.grad], record.UNSHARDED_GRADIENTS))

    first: set[int] = set()  # parameters without a gradient to add to

    def reduce(group: Any) -> None:
        first.clear()
        first.update(id(param) for param, _ in sharded_parameters(group) if param.grad is None)

    def reduced(group: Any) -> None:
        there = [(param, hosted) for param, hosted in sharded_parameters(group) if param.grad is not None]
        recorder.label((param.grad for param, hosted in there if not hosted), record.GRADIENTS)
        # FSDP waits for the copy of a gradient only if the host adds it to another (torch 2.13).
        recorder.copied_to_host(param.grad for param, hosted in there if hosted and id(param) in first)

    def nothing(group: Any) -> None: ...

    stages = {
        "pre_forward": (record.ACTIVATIONS, stage("forward"), nothing),
        "pre_backward": (record.ACTIVATIONS, stage("backward"), nothing),
        "unshard": (record.UNSHARDED, nothing, nothing),
        "wait_for_unshard": (record.UNSHARDED, nothing, hook),
        "post_backward": (record.REDUCTION, reduce, reduced),
    }

    def during(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        kind, before, after = stages[name]

        def wrapped(group: Any, *args: Any, **kwargs: Any) -> Any:
            before(group)
            with recorder.making(kind):
                out = method(group, *args, **kwargs)
            after(group)
            return out

        return wrapped

    def unseen(propagate: Callable[..., Any]) -> Callable[..., Any]:
        def propagated(*args: Any) -> Any:
            with recorder.paused():  # DTensor runs the operation on whole fake tensors to learn its shapes
                return propagate(*args)

        return propagated

    forward = head.ChunkedLinear.forward

    def in_head(*args: Any) -> Any:
        recorder.stage = ("loss", "")
        with recorder.making(record.LOGITS):
            return forward(*args)

    to_host, from_host = recompute.to_host, recompute.from_host

    def sent(tensor: Tensor) -> tuple[torch.device, Tensor]:
        with recorder.paused(), recorder.making(record.HOST):
            device, kept = to_host(tensor)
            recorder.copied_to_host([kept])
        return device, kept

    def returned(kept: tuple[torch.device, Tensor]) -> Tensor:
        with recorder.paused():
            tensor = from_host(kept)
            recorder.copied_to_device([tensor])
        return tensor

    with (
        mock.patch.object(recompute, "to_host", sent),
        mock.patch.object(recompute, "from_host", returned),
        fsdp_stages_wrapped(during),
        shape_propagation_wrapped(unseen),
        mock.patch.object(head.ChunkedLinear, "forward", staticmethod(in_head)),
    ):
        yield


@contextmanager
def without_data(plan: Plan, *, packing: bool) -> Iterator[None]:
    """Replace the code that reads tensors' values.

    Tokens go to every ep rank in equal parts. Packed rows get a mask where documents are not given, but ring attention
    takes each as one document then, without windows; rows that are not packed are one document. Ring attention's
    kernels are not checked, and flash attention stands for all kernels by documents.
    """
    sizes = plan.sizes
    to_list = FakeTensor.tolist
    pairs = 0

    def counted(dispatch: Callable[..., Any]) -> Callable[..., Any]:
        def dispatched(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
            nonlocal pairs
            pairs = -(-index.shape[0] // sizes.tp) * index.shape[1]
            return dispatch(self, hidden, index, weights)

        return dispatched

    def even(tensor: Any) -> Any:
        if tuple(tensor.shape) != (2, sizes.ep):
            return to_list(tensor)
        own = [pairs * (i + 1) // sizes.ep - pairs * i // sizes.ep for i in range(sizes.ep)]
        return [own, own]

    def with_shapes(grouped: Callable[..., bool]) -> Callable[..., bool]:
        # On fake float32 tensors torch's product fails (2.13); transformers' fallback works.
        return lambda tokens, weight, offsets: weight.dtype == torch.bfloat16 and grouped(tokens, weight, offsets)

    find = Visible.find

    def whole_documents(visible: Visible, source: int) -> Any:
        if callable(visible.mask):  # which is made and read
            visible = Visible(CAUSAL, length=visible.length, rank=visible.rank, cp=visible.cp)
        return find(visible, source)

    with (
        documents_found_by(find_packed_sequence_indices if packing else lambda positions: None),
        mock.patch.object(Visible, "find", whole_documents),
        dispatch_wrapped(counted),
        mock.patch.object(FakeTensor, "tolist", even),
        grouped_mm_wrapped(with_shapes),
        mock.patch.object(kernels, "prove", lambda *args: None),
        mock.patch.object(fused, "kernel_for", lambda *args: fused.by_flash),
    ):
        yield
