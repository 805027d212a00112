"""Estimate one optimizer step of one rank: memory by kind, FLOPs, collectives, and the least time they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ndtrain.accelerators import Device
from ndtrain.engine.flops import flops_per_token
from ndtrain.errors import NdtrainError
from ndtrain.estimate.dry import dry_step
from ndtrain.estimate.record import Record
from ndtrain.estimate.roofline import RESERVED, Times, times
from ndtrain.estimate.shorten import Depths, cut_short, depths, whole_name
from ndtrain.hf.model import meta_model
from ndtrain.mesh import MeshSizes
from ndtrain.plan import Plan, make_plan
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sent:
    """All collectives of one kind in a step: their number, their total bytes, the ranks and nodes they span."""

    axis: str
    op: str
    ranks: int
    count: int
    bytes: int
    nodes: int


@dataclass(frozen=True)
class StepEstimate:
    """A step of `rank`, from one dry step, or extrapolated from two dry steps of shallower models."""

    recipe: Recipe
    plan: Plan
    rank: int
    records: tuple[tuple[int, Record], ...]  # (weight, record); their weighted sum gives the totals
    depths: Depths | None
    model_flops: float  # this rank's share of the model FLOPs that MFU counts

    def total(self, of: Callable[[Record], float]) -> float:
        return sum(weight * of(record) for weight, record in self.records)

    @property
    def flops(self) -> int:
        """Floating-point operations that are executed, recomputation included."""
        return round(self.total(lambda record: record.flops))

    @property
    def peaks(self) -> dict[tuple[str, str], dict[str, int]]:
        """{(direction, FSDP unit): {kind: bytes}} at the peak of each stage; see `Record`.

        If fewer layers were run, only the stages of the first and the last layers.
        """
        if self.depths is None:
            return self.records[0][1].peaks
        short, long = (
            {
                (way, name): peak
                for (way, part), peak in record.peaks.items()
                if (name := self._whole(part, layers)) is not None
            }
            for layers, (_, record) in zip(self.depths[:2], self.records, strict=True)
        )
        periods = self.depths.periods
        return {
            stage: {
                kind: short[stage].get(kind, 0) + periods * (peak.get(kind, 0) - short[stage].get(kind, 0))
                for kind in {**peak, **short[stage]}
            }
            for stage, peak in long.items()
            if stage in short
        }

    def _whole(self, name: str, layers: int) -> str | None:
        assert self.depths is not None
        return whole_name(name, self.plan, layers, self.depths)

    @property
    def peak(self) -> tuple[tuple[str, str], dict[str, int]]:
        """The stage that needs the most memory, and its bytes by kind."""
        return max(self.peaks.items(), key=lambda item: sum(item[1].values()))

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak[1].values())

    def room(self, device: Device) -> float:
        """Return the bytes of device memory that are left; negative if the step does not fit."""
        return device.memory * (1 - RESERVED) - self.peak_bytes

    def sent(self, ranks_per_node: int) -> list[Sent]:
        kinds = dict.fromkeys((c.axis, c.op, c.ranks) for _, record in self.records for c in record.sent)

        def amount(axis: str, op: str, *, in_bytes: bool) -> int:
            return round(
                self.total(
                    lambda record: sum(
                        n * (c.bytes if in_bytes else 1) for c, n in record.sent.items() if (c.axis, c.op) == (axis, op)
                    )
                )
            )

        return [
            Sent(
                axis, op, ranks, amount(axis, op, in_bytes=False), amount(axis, op, in_bytes=True),
                self.plan.sizes.spread(axis, self.rank, ranks_per_node)[1],
            )
            for axis, op, ranks in sorted(kinds)
        ]  # fmt: skip

    def times(self, device: Device, ranks_per_node: int) -> Times:
        axes = dict.fromkeys(c.axis for _, record in self.records for c in record.sent)
        # All groups wait for the one that spans the most nodes.
        spread = {axis: self.plan.sizes.spreads(axis, ranks_per_node)[0] for axis in axes}
        return times(self.total, spread, device, min(ranks_per_node, self.plan.sizes.world_size))

    def tokens_per_second(self, seconds: float) -> float:
        """Return the tokens per second of all ranks together."""
        return self.recipe.train.global_batch_size * self.recipe.data.seq_len / seconds

    def mfu(self, seconds: float, device: Device) -> float:
        """Return the model FLOPs per second over the device's peak in fsdp.param_dtype."""
        return self.model_flops / seconds / device.peak(self.recipe.fsdp.param_dtype)


def estimate_step(recipe: Recipe, sizes: MeshSizes, *, rank: int = 0, on_cuda: bool = False) -> StepEstimate:
    """Dry-run a step of `recipe` on a mesh of `sizes`. Raises the errors of `run` and of `dry_step`."""
    model = meta_model(recipe)
    return estimate_plan(recipe, make_plan(model, sizes, recipe), model, rank=rank, on_cuda=on_cuda)


def estimate_plan(
    recipe: Recipe, plan: Plan, model: PreTrainedModel, *, rank: int = 0, on_cuda: bool = False
) -> StepEstimate:
    """Like `estimate_step`, for a plan and its model on meta; the model must not be reused."""
    sizes, length = plan.sizes, recipe.data.seq_len
    tokens = recipe.train.global_batch_size * length / sizes.world_size
    model_flops = flops_per_token(plan, model.config.get_text_config(), length) * tokens
    shallow = depths(model, plan)
    if shallow is not None:
        records = []
        for weight, layers in ((1 - shallow.periods, shallow.short), (shallow.periods, shallow.long)):
            part = meta_model(recipe)
            cut_short(part, plan, layers)
            try:
                records.append(
                    (weight, dry_step(recipe, make_plan(part, sizes, recipe), part, rank=rank, on_cuda=on_cuda))
                )
            except NdtrainError:
                raise
            except Exception:  # a model whose layers depend on one another
                break
        if len(records) == 2:
            return StepEstimate(recipe, plan, rank, tuple(records), shallow, model_flops)
    record = dry_step(recipe, plan, model, rank=rank, on_cuda=on_cuda)
    return StepEstimate(recipe, plan, rank, ((1, record),), None, model_flops)
