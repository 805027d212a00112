"""Runs the second step of a trainer on fake CUDA tensors, and counts what it does."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ndtrain.estimate.dry import without_data
from ndtrain.hf.compat import documents_found_by, find_packed_sequence_indices
from ndtrain.hf.model import meta_model, tie
from ndtrain.hf.positions import fix_frequencies
from ndtrain.parallel.cp.visible import Visible
from ndtrain.plan import make_plan
from ndtrain.recipe import load_recipe
from ndtrain.runs.process import Runtime
from ndtrain.torch_compat import (
    FakeStore,
    FakeTensorMode,
    TorchDispatchMode,
    apply_to_tensors,
    forget_shardings,
    give_collectives_shapes,
)
from ndtrain.train import Silent, Trainer, sizes_for
from ndtrain.train.measure import Measure
from tests import tiny
from tests.fake_cuda.device import present
from tests.fake_cuda.readbacks import ReadBacks

aten = torch.ops.aten


@dataclass(frozen=True)
class Counts:
    """What one step runs on the device, and each place where the host waits for it."""

    kernels: int
    collectives: dict[str, int]
    read_backs: dict[str, int]  # {"what, at a line": times}

    @property
    def golden(self) -> dict[str, int]:
        """All counts by kind."""
        return {"kernels": self.kernels, "read_backs": sum(self.read_backs.values()), **self.collectives}


def counted(kind: str, mesh: dict[str, int], more: dict[str, Any]) -> Counts:
    """Return the counts of rank 0's second step: two micro batches in bfloat16. Raises what a run would."""
    ranks = math.prod(size for axis, size in mesh.items() if axis != "ep")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        batch_ranks = mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)
        path = tiny.recipe_file(
            Path(folder) / "recipe.toml",
            model={"type": kind, "init": "random", "config": tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]}
            | more.get("model", {}),
            corpus=tiny.write_corpus(Path(folder) / "corpus"),
            run_dir=Path(folder) / "run",
            mesh=mesh,
            accumulation=2,
            batch_ranks=batch_ranks,
            **{"fsdp": {"param_dtype": "bfloat16"}, **{key: part for key, part in more.items() if key != "model"}},
        )
        recipe = load_recipe(path)
        model = meta_model(recipe)
        plan = make_plan(model, sizes_for(recipe, ranks), recipe)
        counts = ReadBacks()
        stack.enter_context(present(counts.waits))
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        give_collectives_shapes()
        forget_shardings()
        device = torch.device("cuda", 0)
        runtime = Runtime(rank=0, local_rank=0, world_size=ranks, device=device)
        trainer = Trainer(recipe, plan, model, runtime=runtime, reporter=Silent())
        trainer.open_tokenizer()
        trainer.open_batches()
        trainer._find_length(None)
        engine = trainer.engine
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with _Made(fake):
            engine.cut()
        fix_frequencies(model, None)
        find = Visible.find
        stack.enter_context(fake)
        stack.enter_context(without_data(plan, packing=recipe.data.packing))
        # What a dry step replaces, but a run reads.
        stack.enter_context(mock.patch.object(Visible, "find", find))
        stack.enter_context(documents_found_by(find_packed_sequence_indices))
        stack.enter_context(mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(counts.reading())
        apply_to_tensors(model, lambda tensor: torch.empty_like(tensor, device=device))
        tie(model)
        engine.finish()
        trainer._measure = Measure(engine, ranks=ranks)
        trainer._same_batch = True
        model.train()
        trainer.optimize()
        counts.restart()
        trainer.optimize()
    return Counts(
        counts.kernels,
        dict(sorted(counts.collectives.items())),
        {f"{what}, {line}": times for (what, line), times in sorted(counts.found.items())},
    )


def found_in(fault: Callable[[Tensor], object]) -> list[str]:
    """Return the read-backs of a function of one tensor on the device, or the error that it raises."""
    counts = ReadBacks()
    with present(counts.waits), FakeTensorMode(), counts.reading():
        x = torch.empty(4, 2, device="cuda")
        try:
            fault(x)
        except RuntimeError as error:
            return [type(error).__name__]
    return [what for (what, _), times in counts.found.items() for _ in range(times)]


class _Made(TorchDispatchMode):
    """Makes tensors on the device as fake ones, while those on meta stay real."""

    def __init__(self, fake: Any) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        with self._fake if device is not None and device.type == "cuda" else nullcontext():
            return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Take the kernel that torch takes on an H100, which a build without CUDA does not have."""
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
