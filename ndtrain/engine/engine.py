"""One optimizer step on a mesh: `run` trains with it, `inspect --dry-run` runs it on tensors without content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ndtrain.accelerators import memory_bytes
from ndtrain.checkpoint import load_tensors
from ndtrain.engine.accumulate import accumulates_locally
from ndtrain.engine.gradients import clip_grad_norm, sum_over_tp
from ndtrain.engine.loss import LossModel
from ndtrain.engine.optimizers import OPTIMIZERS, build_optimizer, set_step, state_tensors
from ndtrain.engine.schedule import learning_rate
from ndtrain.hf.compat import documents_given
from ndtrain.hf.model import vocabulary
from ndtrain.hf.routers import Sequences, sequence_ids
from ndtrain.mesh import Meshes, build_mesh
from ndtrain.parallel import parallelize
from ndtrain.parallel.documents import attention_by_documents
from ndtrain.parallel.fsdp import end_of_forward
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


class Engine:
    """Holds a model, its loss and its optimizer on a mesh. Call `cut`, then `finish` once parameters have memory."""

    meshes: Meshes
    loss_model: LossModel
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: PreTrainedModel,
        *,
        device: torch.device,
        kernels_of: Literal["cpu", "cuda"] | None = None,
    ):
        """`kernels_of` is the type of device whose attention kernels are taken; by default that of `device`."""
        self.recipe, self.plan, self.model, self.device = recipe, plan, model, device
        self.kernels_of = kernels_of or device.type
        self.sizes = plan.sizes
        self.vocabulary = vocabulary(model)
        # Whether micro batches add up whole gradients on every rank, which are reduced once.
        self.accumulates_locally = accumulates_locally(recipe, plan, memory_bytes(device))

    def cut(self) -> None:
        """Build the meshes and apply the plan to the model, which stays on meta. Collective."""
        self.meshes = build_mesh(self.sizes, self.device.type)
        # First, so that a rank of ulysses, which has whole sequences of some heads, attends by it.
        self.documents = attention_by_documents(self.model, self.plan, self.recipe, kernels_of=self.kernels_of)
        self.context, self.sequence = parallelize(self.model, self.plan, self.meshes, recipe=self.recipe)

    def finish(self) -> None:
        """Make the optimizer and put the loss around the model."""
        # To walk through all modules in each step takes the host as long as a few layers.
        self._parameters = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.model, self.recipe, self.plan, self.device)
        # A model cannot see from a part of a sequence which positions its tokens have.
        self.loss_model = LossModel(
            self.model,
            self.plan,
            pass_positions=bool(self.recipe.data.packing) or self.context is not None,
            tp_group=self.meshes.tp.get_group(),
            cp_group=self.meshes.dense["cp"].get_group() if self.context is not None else None,
        )

    # ---- one step

    def shape(self, batch: Batch) -> Batch:
        """Return the micro batch as the model takes it: this rank's part of each sequence."""
        parts = self.context is not None and self.context.enabled
        ring = parts and self.plan.cp == "ring"
        if self.recipe.data.packing and "flash" in self.recipe.model.attn and not ring:
            # Flash attention tells documents apart by their positions only in a batch of one row.
            batch = {key: value.reshape(1, -1) for key, value in batch.items()}
        if self.context is not None and parts:
            batch = self.context.split(batch, packed=bool(self.recipe.data.packing))
        return batch

    def tp_summed(self) -> tuple[str, ...]:
        """Return the FQNs of parameters that each tp rank holds whole, with only a part of the gradient."""
        along = self.plan.sequence if self.sequence is not None and self.sequence.enabled else None
        return self.plan.tp_summed + (along.norms if along is not None else ())

    def gradients(
        self, batches: Sequence[Batch], *, counts: torch.Tensor, done: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """Run forward and backward of every micro batch (as `LossModel.backward` takes them, before `shape`).

        `counts` has the target tokens and the sequences of the global batch, int64 `[2]` on the device, so that the
        host need not know them yet. The head leaves out what is not among the `targets` of a batch, and masks keep its
        `documents` apart, where it has them (`GlobalBatches`).
        `done` is called after each micro batch. Returns this rank's sums of the cross-entropy and of the auxiliary
        loss, in float64.
        """
        scales = counts.clamp(min=1).double().reciprocal().float()
        total = torch.zeros(2, dtype=torch.float64, device=batches[0]["input_ids"].device)
        for i, batch in enumerate(batches):
            last, units = i == len(batches) - 1, cast(FSDPModule, self.model)
            if self.accumulates_locally:
                units.set_requires_gradient_sync(last)
            elif self.sizes.dp_replicate > 1:
                # Replicas exchange gradients once, after the last micro batch; shards are reduced at every one.
                units.set_requires_all_reduce(last)
            rows = {key: value for key, value in batch.items() if key not in ("targets", "documents")}
            shaped = self.shape(rows) | {key: value for key, value in batch.items() if key not in rows}
            with self.apart(shaped.pop("documents", None)):
                total += self.loss_model.backward(shaped, scales=scales, sequences=self._sequences(rows))
            done()
        return total

    @property
    def marks_documents(self) -> bool:
        """Whether micro batches have to say of which document each token is; flash attention finds that itself."""
        finds_them = "flash" in self.recipe.model.attn and self.plan.cp != "ring"
        return bool(self.recipe.data.packing) and not finds_them

    def on_device(self, batch: Batch) -> Batch:
        """Return a micro batch of the host on the device, but its documents, which the host has to know."""
        return {
            name: values if name == "documents" else values.to(self.device, non_blocking=True)
            for name, values in batch.items()
        }

    @contextmanager
    def apart(self, documents: torch.Tensor | None) -> Iterator[None]:
        """Let forward and backward inside keep these documents apart, as `documents_of` returns them, on the host.

        None leaves it to transformers to find them. Under cp, after `shape`.
        """
        split = self.context is not None and self.context.enabled
        by_documents = self.documents if self.documents is not None and self.documents.enabled else None
        if split and self.plan.cp == "ring":
            by_documents = None
        with ExitStack() as stack:
            if documents is not None:
                masked = documents if by_documents is None else documents[:, :0]
                if self.context is not None and split:
                    stack.enter_context(self.context.apart(masked))
                elif by_documents is None:
                    stack.enter_context(documents_given(self.model, masked.to(self.device, non_blocking=True)))
                if by_documents is not None:
                    stack.enter_context(by_documents.given(documents))
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the model in eval mode inside, for forwards without gradients. Afterwards all is as before.

        Each time it begins with the same random numbers, should a model draw any.
        """
        training = [module for module in self.model.modules() if module.training]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.recipe.train.seed)
            self.model.eval()
            yield
        for module in training:
            module.training = True
        end_of_forward(self.model)

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Return the summed cross-entropy, in float32, of this rank's part of a micro batch before `shape`."""
        rows = {key: value for key, value in batch.items() if key != "documents"}
        shaped = self.shape(rows)
        with self.apart(batch.get("documents")):
            return self.loss_model.evaluate(shaped)

    def clip(self) -> torch.Tensor:
        """Complete the gradients over tp and scale them to `optim.max_grad_norm`; return their norm before scaling."""
        if summed := self.tp_summed():
            sum_over_tp([self._parameters[fqn] for fqn in summed], self.meshes.tp.get_group())
        return clip_grad_norm(self._parameters.values(), self.recipe.optim.max_grad_norm)

    def update(self, step: int, *, skip: torch.Tensor) -> float:
        """Update the parameters for `step` (from 0), drop the gradients, and return `optim.lr` as of this step.

        Where `skip`, a float32 scalar on the device, is 1 and not 0, no parameter and no state changes.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, step, peak=group["peak_lr"])
        self.optimizer.rounding.update = step  # type: ignore[attr-defined]
        # A kernel on the host reads it at once, so it has to be there.
        self.optimizer.found_inf = skip.cpu() if self.plan.on_host else skip  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return learning_rate(self.recipe, step, peak=self.recipe.optim.lr)

    def _sequences(self, batch: Batch) -> Sequences | None:
        """Return what a router's auxiliary loss needs of the micro batch; None where there is no such loss."""
        if self.loss_model.router is None:
            return None
        # Split like labels, so that padding belongs to no sequence.
        ids = self.shape({**batch, "labels": sequence_ids(batch["labels"])})["labels"]
        return Sequences(ids, rows=len(batch["labels"]))

    # ---- the optimizer's state

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """Return the optimizer's state as named tensors, sharded."""
        return state_tensors(self.model, self.optimizer, OPTIMIZERS[self.recipe.optim.name])

    def restore_optimizer(self, directory: Path, *, updates: int, progress: Callable[[], None] = lambda: None) -> None:
        """Load the optimizer's state after `updates` updates from a tensor directory; collective.

        Works with and without gradients. `progress` is called after each block that is read. Raises `DamagedError` as
        `load_tensors` does.
        """
        load_tensors(directory, self.optimizer_tensors(), all_of_it=True, cast=True, progress=progress)
        set_step(self.model, self.optimizer, updates)
