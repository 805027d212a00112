"""Run one training step with the code that `run` uses, on tensors without data and on simulated ranks.

`FakeTensorMode` gives tensors shapes but no memory. torch's fake process group has any number of ranks, and its
collectives do nothing (torch.testing._internal, read at 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from ndtrain.data.batches import micro_batches
from ndtrain.engine import loss
from ndtrain.engine.engine import Engine
from ndtrain.errors import NdtrainError, PlanError
from ndtrain.estimate import record
from ndtrain.estimate.record import Record, Recorder
from ndtrain.hf.model import tie
from ndtrain.hf.positions import fix_frequencies
from ndtrain.mesh import Meshes
from ndtrain.parallel.cp import kernels
from ndtrain.parallel.cp.visible import Visible
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dry_step(recipe: Recipe, plan: Plan, model: PreTrainedModel, *, rank: int) -> Record:
    """Record what `rank` does in one optimizer step after the first. `model` (on meta) is sharded: do not reuse it.

    Tokens are spread evenly over experts. Raises `PlanError` for a model whose shapes depend on tensors' values.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise NdtrainError("a dry step needs a process without a process group, since it starts its own")
    dist.init_process_group("fake", rank=rank, world_size=plan.sizes.world_size, store=FakeStore())
    try:
        import torch.distributed._tools.fake_collectives

        engine = Engine(recipe, plan, model, device=torch.device("cpu"))
        engine.cut()
        fix_frequencies(model, None)
        recorder = Recorder(axes(engine.meshes))
        try:
            with (
                FakeTensorMode(allow_non_fake_inputs=True),
                recorder,
                watched(recorder),
                _without_data(plan, packing=recipe.data.packing),
            ):
                run_step(engine, recorder, batches(recipe, plan))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise PlanError(
                f"{plan.model_type} cannot be run on tensors without data: it needs the values that {error} returns; "
                "leave out --dry-run, --device, --html and --suggest"
            ) from error
        return recorder.record
    finally:
        dist.destroy_process_group()


def run_step(engine: Engine, recorder: Recorder, loaded: list[dict[str, Tensor]]) -> None:
    """Make the parameters and the optimizer state, then record the engine's second step."""
    model, plan = engine.model, engine.plan
    with recorder.making(record.PARAMETERS):
        model._apply(lambda tensor: torch.empty_like(tensor, device="cpu"))
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

    engine.gradients(loaded[:3], count=rows * engine.recipe.data.seq_len, rows=rows, done=done)
    recorder.stage = ("update", "")
    engine.clip()
    engine.update(0)


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
    """Label FSDP's buffers, the loss's logits and the gradients for the recorder (written for torch 2.13's FSDP)."""
    hooked: set[Tensor] = set()

    def during(
        kind: str, method: Callable[..., Any], before: Callable[[Any], None], after: Callable[[Any], None]
    ) -> Callable[..., Any]:
        def wrapped(group: Any, *args: Any, **kwargs: Any) -> Any:
            before(group)
            with recorder.making(kind):
                out = method(group, *args, **kwargs)
            after(group)
            return out

        return wrapped

    def stage(direction: str) -> Callable[[Any], None]:
        def enter(group: Any) -> None:
            recorder.stage = (direction, group._module_fqn or "")

        return enter

    def hook(group: Any) -> None:
        for held in group.fsdp_params:
            whole = getattr(held, "_unsharded_param", None)
            if whole is not None and whole.requires_grad and whole not in hooked:
                hooked.add(whole)
                whole.register_post_accumulate_grad_hook(lambda p: recorder.label([p.grad], record.UNSHARDED_GRADIENTS))

    def reduced(group: Any) -> None:
        for held in group.fsdp_params:
            grad = held.sharded_param.grad
            if grad is not None:
                recorder.label([grad], record.HOST if held.offload_to_cpu else record.GRADIENTS)

    def nothing(group: Any) -> None: ...

    head = loss._ChunkedHead.forward
    sharding = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagated(*args: Any) -> Any:
        with recorder.paused():  # DTensor runs the operation on whole fake tensors to learn its shapes
            return sharding(*args)

    def in_head(*args: Any) -> Any:
        recorder.stage = ("loss", "")
        with recorder.making(record.LOGITS):
            return head(*args)

    with ExitStack() as patched:
        for name, kind, before, after in (
            ("pre_forward", record.ACTIVATIONS, stage("forward"), nothing),
            ("pre_backward", record.ACTIVATIONS, stage("backward"), nothing),
            ("unshard", record.UNSHARDED, nothing, nothing),
            ("wait_for_unshard", record.UNSHARDED, nothing, hook),
            ("post_backward", record.REDUCTION, nothing, reduced),
        ):
            method = getattr(FSDPParamGroup, name)
            patched.enter_context(mock.patch.object(FSDPParamGroup, name, during(kind, method, before, after)))
        patched.enter_context(mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagated))
        patched.enter_context(mock.patch.object(loss._ChunkedHead, "forward", staticmethod(in_head)))
        yield


@contextmanager
def _without_data(plan: Plan, *, packing: bool) -> Iterator[None]:
    """Replace the code that reads tensors' values.

    Tokens go to every ep rank in equal parts. Packed rows get a mask, but ring attention takes each as one document;
    rows that are not packed are one document. Ring attention's kernels are not checked.
    """
    from transformers import masking_utils
    from transformers.distributed.expert_parallel import AllToAllEP
    from transformers.integrations import moe

    sizes = plan.sizes
    dispatch, to_list = AllToAllEP._dispatch_tokens, FakeTensor.tolist
    grouped = moe._can_use_grouped_mm
    pairs = 0

    def dispatched(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
        nonlocal pairs
        pairs = -(-index.shape[0] // sizes.tp) * index.shape[1]
        return dispatch(self, hidden, index, weights)

    def even(tensor: Any) -> Any:
        if tuple(tensor.shape) != (2, sizes.ep):
            return to_list(tensor)
        own = [pairs * (i + 1) // sizes.ep - pairs * i // sizes.ep for i in range(sizes.ep)]
        return [own, own]

    def in_groups(tokens: Tensor, weight: Tensor, offsets: Tensor) -> Any:
        # On fake float32 tensors torch's product fails (2.13); transformers' fallback works.
        return weight.dtype == torch.bfloat16 and grouped(tokens, weight, offsets)

    find = Visible._find

    def whole_documents(visible: Visible, source: int) -> Any:
        return find(Visible("causal", length=visible.length, rank=visible.rank, cp=visible.cp), source)

    documents = masking_utils.find_packed_sequence_indices if packing else lambda positions: None
    with (
        mock.patch.object(masking_utils, "find_packed_sequence_indices", documents),
        mock.patch.object(Visible, "_find", whole_documents),
        mock.patch.object(AllToAllEP, "_dispatch_tokens", dispatched),
        mock.patch.object(FakeTensor, "tolist", even),
        mock.patch.object(moe, "_can_use_grouped_mm", in_groups),
        mock.patch.object(kernels, "prove", lambda *args: None),
    ):
        yield
