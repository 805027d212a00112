"""Runs the second step of a trainer on fake CUDA tensors, and counts what it does."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from ndtrain.estimate.dry import without_data
from ndtrain.hf.compat import documents_found_by, find_packed_sequence_indices
from ndtrain.hf.model import meta_model, tie
from ndtrain.hf.positions import fix_frequencies
from ndtrain.parallel import documents, fused
from ndtrain.parallel.cp import interface
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

LENGTH = 104  # whose halves and quarters too are unlike other sizes of the models


@dataclass(frozen=True)
class Counts:
    """What one step runs on the device, and each place where the host waits for it."""

    kernels: int
    masks: int  # tensors with two dims of the length of a row, or of its part on a rank
    attention: dict[str, int]  # forward passes of attention, by operator
    collectives: dict[str, int]
    read_backs: dict[str, int]  # {"what, at a line": times}

    @property
    def golden(self) -> dict[str, int]:
        """All counts by kind."""
        waits = sum(self.read_backs.values())
        return {"kernels": self.kernels, "read_backs": waits, "masks": self.masks, **self.attention, **self.collectives}


def counted(kind: str, mesh: dict[str, int], more: dict[str, Any], *, length: int = LENGTH) -> Counts:
    """Return the counts of rank 0's second step: two micro batches in bfloat16, of rows of several documents.

    Raises what a run would.
    """
    ranks = math.prod(size for axis, size in mesh.items() if axis != "ep")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        batch_ranks = mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)
        path = tiny.recipe_file(
            Path(folder) / "recipe.toml",
            model={"type": kind, "init": "random", "config": _config(kind, length)} | more.get("model", {}),
            corpus=_documents(Path(folder) / "documents.jsonl", length),
            run_dir=Path(folder) / "run",
            mesh=mesh,
            accumulation=2,
            batch_ranks=batch_ranks,
            data={"seq_len": length},
            **{"fsdp": {"param_dtype": "bfloat16"}, **{key: part for key, part in more.items() if key != "model"}},
        )
        recipe = load_recipe(path)
        model = meta_model(recipe)
        plan = make_plan(model, sizes_for(recipe, ranks), recipe)
        counts = ReadBacks(squares={length // parts for parts in (1, 2, 4)})
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
        # The host knows what is in its tensors.
        size = recipe.train.global_batch_size
        loaded = {cursor: trainer.batches.load(cursor) for cursor in range(0, 3 * size, size)}
        stack.enter_context(mock.patch.object(trainer.batches, "load", loaded.__getitem__))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with _Made(fake):
            engine.cut()
        fix_frequencies(model, None)
        find, kernel_for = Visible.find, fused.kernel_for
        stack.enter_context(fake)
        stack.enter_context(without_data(plan, packing=recipe.data.packing))
        # What a dry step replaces, but a run reads.
        stack.enter_context(mock.patch.object(Visible, "find", find))
        stack.enter_context(mock.patch.object(fused, "kernel_for", kernel_for))
        stack.enter_context(documents_found_by(find_packed_sequence_indices))
        stack.enter_context(mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(mock.patch.object(fused, "_flex", lambda device: _flex_attention))
        for module in (documents, interface):
            unwrapped = partial(_unwrapped, module.document_bounds)
            stack.enter_context(mock.patch.object(module, "document_bounds", unwrapped))
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
        counts.masks,
        dict(sorted(counts.attention.items())),
        dict(sorted(counts.collectives.items())),
        {f"{what}, {line}": times for (what, line), times in sorted(counts.found.items())},
    )


def _config(kind: str, length: int) -> dict[str, Any]:
    config = dict(tiny.CONFIGS.get(kind) or tiny.MATRIX[kind])
    positions = next(key for key in ("max_position_embeddings", "n_positions") if key in config)
    return {**config, positions: max(config[positions], length)}


def _documents(path: Path, length: int) -> Path:
    """Write documents of up to half a row, for a few steps."""
    sizes = itertools.cycle(range(3, length // 2, max(1, length // 40)))
    written = 0
    with path.open("w") as file:
        while written < 40 * length:
            written += (size := next(sizes))
            file.write(json.dumps({"text": "a" * size}) + "\n")
    return path


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


def _unwrapped(function: Callable[[Tensor], Any], tensor: Tensor) -> Any:
    """Call `function` with a tensor of the host as it is, which a fake mode would replace."""
    with unset_fake_temporarily():
        return function(tensor)


class _Flex(torch.autograd.Function):
    """Returns what FlexAttention's compiled kernels return, and takes what they take."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(query, key, value)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        return out, query.new_empty(query.shape[:3], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, **options: Any) -> Any:
    assert block_mask.kv_indices.is_cuda and block_mask.full_q_indices.is_cuda
    assert block_mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
    out, lse = _Flex.apply(query, key, value)
    return out if options["return_aux"] is None else (out, SimpleNamespace(lse=lse))
