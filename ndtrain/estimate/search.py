"""Search for the fastest meshes that fit: formulas rank the candidates, and dry steps measure the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from ndtrain.accelerators import Device
from ndtrain.data.batches import micro_batches
from ndtrain.engine.flops import flops_per_token
from ndtrain.errors import NdtrainError, PlanError, first_line
from ndtrain.estimate.record import Collective
from ndtrain.estimate.roofline import OVERLAPPED, RESERVED, Times, host_link, seconds
from ndtrain.estimate.step import StepEstimate, estimate_step
from ndtrain.hf.model import meta_model
from ndtrain.hf.routers import expert_count
from ndtrain.mesh import AXES
from ndtrain.plan import make_plan
from ndtrain.recipe import Recipe
from ndtrain.train import sizes_for

SHOWN = 5
SEARCHED = 16  # candidates that are looked at,
SEARCHED_AT_MOST = 64  # and so many if none of these fits
TRIES = 3  # candidates of one mesh: the fastest, and the one that needs the least memory
COSTLY = 1.5  # a change with this much more device time is not advised alone

Change = dict[str, Any]
_AXES = (*AXES, "ep")


@dataclass(frozen=True)
class Suggestion:
    """Keys of the recipe to set, and the resulting step."""

    change: Change
    step: StepEstimate
    times: Times

    @property
    def tokens_per_second(self) -> float:
        return self.step.tokens_per_second(self.times.step)

    @property
    def device_seconds(self) -> float:
        """Return the cost of a step: its seconds on all devices together."""
        return self.step.plan.sizes.world_size * self.times.step


@dataclass(frozen=True)
class Failure:
    """A candidate without an estimate, and why: the plan refuses it, or an error in one line."""

    change: Change
    reason: str


@dataclass(frozen=True)
class Search:
    """What a search found, fastest first, and how much it looked at.

    `candidates` counts all meshes and settings, `too_big` those of them that do not fit by the formulas.
    """

    found: list[Suggestion]
    failed: list[Failure]
    searched: int
    candidates: int
    too_big: int


def changed(recipe: Recipe, change: Change) -> Recipe:
    """Return `recipe` with the values of `change`, by `section.key`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in change.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=keys) for name, keys in sections.items()}
    )


def suggest(
    recipe: Recipe,
    world_size: int,
    device: Device,
    ranks_per_node: int,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Search:
    """Return at most `SHOWN` meshes and settings of `recipe` for `world_size` ranks that fit `device`, fastest first.

    The result does not depend on the machine or its speed: the first `SEARCHED` candidates in the order of the formulas
    are looked at, then more until one fits, `SEARCHED_AT_MOST` in all. A candidate that fails is noted. `progress` gets
    the number that was looked at and the most that will be. Raises `PlanError` if none was found.
    """
    count = _Count(recipe, device, ranks_per_node)
    every = list(_candidates(recipe, world_size, ranks_per_node, count.experts))
    fitting = [change for change in every if count.bytes(change, world_size) < count.limit]
    fitting.sort(key=lambda change: count.seconds(change, world_size))
    of_mesh: dict[tuple[Any, ...], list[Change]] = {}
    for change in fitting:
        of_mesh.setdefault(_mesh(change), []).append(change)
    least = {mesh: min(all_, key=lambda change: count.bytes(change, world_size)) for mesh, all_ in of_mesh.items()}
    ordered = [c for c in fitting if c in of_mesh[_mesh(c)][: TRIES - 1] or c is least[_mesh(c)]]
    found: list[Suggestion] = []
    failed: list[Failure] = []
    reason = "weights, gradients and optimizer state fit on none"
    settled: set[tuple[Any, ...]] = set()  # meshes that fit or failed
    searched = 0
    for change in ordered:
        if _mesh(change) in settled:
            continue
        if searched >= (SEARCHED if found else SEARCHED_AT_MOST):
            break
        progress(searched, min(len(ordered), SEARCHED if searched < SEARCHED else SEARCHED_AT_MOST))
        searched += 1
        one = _try(recipe, change, world_size, device, ranks_per_node)
        if one is None:
            reason = "the step does not fit"
            continue
        settled.add(_mesh(change))
        if isinstance(one, Suggestion):
            found.append(one)
        else:
            reason = one.reason
            failed.append(one)
    if not found:
        raise PlanError(
            f"no mesh of {world_size} x {device.name} was found for this recipe (searched {searched} of {len(every)} "
            f"candidates; {len(every) - len(fitting)} do not fit by a rough estimate); the last reason: {reason}"
        )
    best = sorted(found, key=lambda one: one.times.step)[:SHOWN]
    return Search(best, failed, searched, len(every), len(every) - len(fitting))


def _mesh(change: Change) -> tuple[Any, ...]:
    return tuple(value for key, value in change.items() if key.startswith("mesh."))


def fixes(
    recipe: Recipe, step: StepEstimate, device: Device, ranks_per_node: int
) -> tuple[list[Suggestion], list[Failure]]:
    """Return the single changes that make `recipe` fit, in the order of their device time, and those that failed.

    More ranks are tried only if all others are costly.
    """
    sizes, train = step.plan.sizes, recipe.train
    single: list[Change] = [
        {"train.activation_checkpointing": kind}
        for kind in ("selective", "full")
        if train.activation_checkpointing not in (kind, "full", "offload")
    ]
    rows, _ = micro_batches(train.global_batch_size, sizes.batch, train.micro_batch_size)
    single += [{"train.micro_batch_size": n} for n in sorted({rows // 2, 1}) if 0 < n < rows]
    single += [{"fsdp.reshard_after_forward": True}] if not recipe.fsdp.reshard_after_forward else []
    single += [{"fsdp.cpu_offload": True}] if not recipe.fsdp.cpu_offload else []
    tried = [_try(recipe, change, sizes.world_size, device, ranks_per_node) for change in single]
    found = [one for one in tried if isinstance(one, Suggestion)]
    now = sizes.world_size * step.times(device, ranks_per_node).step
    more = 2 * sizes.dp_shard
    while all(one.device_seconds > COSTLY * now for one in found):
        if sizes.dp_replicate * more * sizes.cp > 4096 or sizes.dp_replicate * more > train.global_batch_size:
            break
        change = {"mesh.dp_shard": more}
        larger = _try(recipe, change, sizes.world_size // sizes.dp_shard * more, device, ranks_per_node)
        tried.append(larger)
        if larger is not None:
            break
        more *= 2
    found = sorted((one for one in tried if isinstance(one, Suggestion)), key=lambda one: one.device_seconds)
    return found, [one for one in tried if isinstance(one, Failure)]


def _try(
    recipe: Recipe, change: Change, world_size: int, device: Device, ranks_per_node: int
) -> Suggestion | Failure | None:
    """Return the suggestion of `change`, why it failed, or None if its step does not fit."""
    try:
        other = changed(recipe, change)
        step = estimate_step(other, sizes_for(other, world_size), on_cuda=True)
        return Suggestion(change, step, step.times(device, ranks_per_node)) if step.room(device) >= 0 else None
    except NdtrainError as error:
        return Failure(change, str(error))
    except Exception as error:  # in the model's own code
        return Failure(change, first_line(error))


def _candidates(recipe: Recipe, world_size: int, ranks_per_node: int, experts: int) -> Iterator[Change]:
    batch = recipe.train.global_batch_size
    for sizes in _meshes(world_size, ranks_per_node, experts):
        mesh = {f"mesh.{axis}": size for axis, size in zip(_AXES, sizes, strict=True)}
        rows = batch // (sizes[0] * sizes[1])
        micro = [n for n in (1, 2, 4, 8) if n <= rows]
        if sizes[3] > 1 and not recipe.tp.sequence_parallel:
            mesh["tp.sequence_parallel"] = True  # less memory and computation on a tp rank for the same communication
        for number, recompute, reshard in product(micro, ("none", "selective", "full"), (True, False)):
            yield mesh | {
                "train.micro_batch_size": number,
                "train.activation_checkpointing": recompute,
                "fsdp.reshard_after_forward": reshard,
            }


def _meshes(world_size: int, ranks_per_node: int, experts: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield sizes of `_AXES`: tp within a node, replicas of whole nodes, ep that divides the experts."""
    for tp in _divisors(min(world_size, ranks_per_node)):
        for cp in _divisors(world_size // tp) if world_size % tp == 0 else ():
            data = world_size // (tp * cp)
            for replicas in sorted({1, data // max(1, ranks_per_node // (tp * cp))}):
                if cp > 64 or not replicas or data % replicas:
                    continue
                shard = data // replicas
                spans = [ep for ep in _divisors(shard * cp * tp) if experts and not ep % tp and not experts % ep]
                for ep in sorted({1, *spans}):
                    yield replicas, shard, cp, tp, ep


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


class _Count:
    """A step's memory and time by formulas: exact enough to choose which changes to dry-run."""

    def __init__(self, recipe: Recipe, device: Device, ranks_per_node: int):
        model = meta_model(recipe)
        text = model.config.get_text_config()
        self.recipe, self.device, self.ranks_per_node = recipe, device, ranks_per_node
        self.limit = device.memory * (1 - RESERVED) * 1.1
        alone = changed(recipe, {f"mesh.{axis}": 1 for axis in _AXES})
        plan = make_plan(model, sizes_for(alone, 1), alone)
        self.flops = flops_per_token(plan, text, recipe.data.seq_len)
        self.numel, self.experts = plan.numel, expert_count(text)
        self.hosted = sum(p.numel for p in plan.params if p.fqn in plan.on_host)
        # Parameter, gradient and AdamW's two moments, of which Muon has one for most.
        states = (8 if recipe.optim.name == "adamw" else 4) // (2 if recipe.optim.state_dtype == "bfloat16" else 1)
        self.each = 8 + states
        self.in_experts = sum(p.numel for p in plan.params if ".experts." in p.fqn)
        self.layers = max(1, len(plan.blocks))
        self.hidden = getattr(text, "hidden_size", 0) or 1024
        self.vocabulary = getattr(text, "vocab_size", 0) or 1
        self.itemsize = 2 if recipe.fsdp.param_dtype != "float32" else 4
        # Elements that a layer keeps of each token for its backward pass: the inputs of its products and norms.
        shapes = [p.shape for p in plan.params if len(p.shape) == 2 and p.unit.startswith(plan.blocks[:1] or "?")]
        products = sum(s[0] for s in shapes)
        self.kept = {"none": 6 * self.hidden + 2 * products, "selective": self.hidden + products, "full": self.hidden}

    def bytes(self, change: Change, world_size: int) -> float:
        replicas, _, cp, tp, _ = (change[f"mesh.{axis}"] for axis in _AXES)
        tokens = change["train.micro_batch_size"] * self.recipe.data.seq_len / cp
        states = self.each * (self.numel - self.hosted) * replicas / world_size
        layer = self.numel / self.layers / tp
        whole = self.itemsize * (self.numel / tp if not change["fsdp.reshard_after_forward"] else 2 * layer)
        each = self.kept[change["train.activation_checkpointing"]]
        kept = self.itemsize * tokens * each * self.layers / tp
        head = 6 * self.hidden * self.vocabulary / tp
        return states + whole + kept + head

    def seconds(self, change: Change, world_size: int) -> float:
        replicas, shard, cp, tp, ep = (change[f"mesh.{axis}"] for axis in _AXES)
        recipe, device, fsdp = self.recipe, self.device, shard * cp
        rows, steps = micro_batches(recipe.train.global_batch_size, replicas * shard, change["train.micro_batch_size"])
        tokens = rows * recipe.data.seq_len / cp
        recompute = change["train.activation_checkpointing"]
        again = 4 / 3 if recompute == "full" else 1
        compute = steps * tokens * self.flops * again / tp / device.peak(recipe.fsdp.param_dtype)
        again = 4 / 3 if recompute != "none" else 1
        moved = steps * tokens * self.kept["none"] * self.layers * 6 * self.itemsize
        compute += moved * again / tp / device.bandwidth
        weights = (self.numel - self.in_experts * (1 - 1 / ep if ep > 1 else 0)) / (tp if ep == 1 else 1)
        gathers = (2 if change["fsdp.reshard_after_forward"] else 1) * self.itemsize + 4
        sent = {"fsdp": steps * self._over(weights * gathers, fsdp, tp)}
        sent["dp_replicate"] = 2 * self._over(4 * weights / fsdp, replicas, fsdp * tp)
        moved = steps * tokens * self.hidden * self.layers * self.itemsize
        sent["tp"] = self._over(8 * moved, tp, 1) if tp > 1 else 0.0
        sent["cp"] = self._over(8 * moved / tp, cp, tp) if cp > 1 else 0.0
        sent["ep"] = self._over(8 * moved, ep, 1) if ep > 1 else 0.0
        hidden = sum(sent[axis] for axis in sent if axis in OVERLAPPED)
        alone = sum(t for axis, t in sent.items() if axis not in OVERLAPPED)
        # In host memory: AdamW (28 bytes), the norm and its clipping (12), and sums of gradients (12 and a copy of 4).
        on_node = min(self.ranks_per_node, world_size)
        hosted, link = self.hosted * replicas / world_size, host_link(device, on_node)
        later = steps - 1 if replicas == 1 else 0
        alone += hosted * ((40 + 12 * later) * on_node / device.host_bandwidth + 4 * later / link)
        copied = hosted * 4 * steps * (2 if change["fsdp.reshard_after_forward"] else 1) / link
        return max(compute, hidden, copied) + alone

    def _over(self, size: float, ranks: int, stride: int) -> float:
        on_node = max(1, min(ranks, self.ranks_per_node // stride))
        what = Collective("", ranks, "all_gather", int(size))
        return seconds(what, self.device, on_node=on_node, nodes=-(-ranks // on_node)) if ranks > 1 else 0.0
