"""What people see: the plan of `inspect`, the progress of `run`. The only importer of rich."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ndtrain.metrics import StepMetrics
from ndtrain.model import meta_model
from ndtrain.plan import EVEN, ParamPlan, Plan, make_plan
from ndtrain.recipe import Recipe
from ndtrain.train import sizes_for, with_checkpoint


class Reporter:
    """Tells of a run: one live line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said = 0.0
        self._pace: float | None = None

    def info(self, line: str) -> None:
        (self._bar.console if self._bar else self._console).print(line, markup=False)

    def _task(self, what: str, total: int) -> TaskID:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:,}/{task.total:,} {task.fields[detail]}", markup=False),
                console=self._console,
            )
            self._bar.start()
        if what not in self._tasks:
            for old in self._tasks.values():
                self._bar.remove_task(old)
            self._tasks = {what: self._bar.add_task(what, total=total, detail="")}
        return self._tasks[what]

    def progress(self, what: str, done: int, total: int) -> None:
        """Progress of a long preparation, in bytes."""
        if self._live:
            self._bar_update(what, done, total, detail="bytes")
        elif done >= total or time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            self.info(f"{what} {done:,} of {total:,} bytes")

    def step(self, metrics: StepMetrics, *, steps: int, show: bool) -> None:
        """One optimizer step; `show` says whether it is due where lines are printed."""
        self._pace = metrics.step_seconds if self._pace is None else 0.8 * self._pace + 0.2 * metrics.step_seconds
        eta = _duration(self._pace * (steps - metrics.step))
        aux = "" if metrics.aux_loss is None else f"aux {metrics.aux_loss:.4f}  "
        text = (
            f"loss {metrics.loss:.4f}  {aux}grad {metrics.grad_norm:.3f}  lr {metrics.lr:.2e}  "
            f"{metrics.tokens_per_second:,.0f} tokens/s  ETA {eta}"
        )
        if self._live:
            self._bar_update("step", metrics.step, steps, detail=text)
        elif show:
            self.info(f"step {metrics.step}/{steps}  {text}")

    def _bar_update(self, what: str, done: int, total: int, *, detail: str) -> None:
        task = self._task(what, total)
        assert self._bar is not None
        self._bar.update(task, completed=done, total=total, detail=detail)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ByteProgress:
    """A bar of bytes, speed and time left on standard error; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ByteProgress:
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(binary_units=True))
            self._bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
            self._bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total)
            self._bar.update(self._tasks[what], completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"


def inspect_text(recipe: Recipe, *, world_size: int | None, rank: int, as_json: bool) -> str:
    """The plan of `recipe` for `world_size` ranks as a table or as JSON; raises what `run` would raise."""
    from ndtrain.errors import RecipeError

    recipe, _ = with_checkpoint(recipe)
    mesh = recipe.mesh
    if world_size is None:
        world_size = mesh.dp_replicate * max(1, mesh.dp_shard) * mesh.cp * mesh.tp
    sizes = sizes_for(recipe, world_size)
    if not 0 <= rank < world_size:
        raise RecipeError(f"--rank {rank} must be from 0 to {world_size - 1}")
    plan = make_plan(meta_model(recipe), sizes, recipe)
    report = plan_report(plan, rank=rank)
    return json.dumps(report, indent=2) if as_json else _plan_text(plan, report, rank)


def plan_report(plan: Plan, *, rank: int) -> dict[str, Any]:
    """The plan as JSON-ready data; bytes of one rank and of the largest, for float32 parameters, gradients, AdamW.

    `in_host_memory` is the part of a total that cpu_offload keeps off the device.
    """
    sizes = plan.sizes
    largest = 0  # see Plan.imbalance

    def held(numels: dict[str, int]) -> dict[str, int]:
        numel, hosted = sum(numels.values()), sum(n for fqn, n in numels.items() if fqn in plan.on_host)
        parts = {"parameters": 4 * numel, "gradients": 4 * numel, "optimizer": 8 * numel}
        return {**parts, "total": 16 * numel, "in_host_memory": 16 * hosted}

    def of_rank(number: int) -> dict[str, int]:
        return held({p.fqn: p.local_numel(sizes, number) for p in plan.params})

    return {
        "model_type": plan.model_type,
        "mesh": {**asdict(sizes), "world_size": sizes.world_size, "fsdp": sizes.fsdp, "batch": sizes.batch},
        "rank": rank,
        "coordinate": sizes.coordinate(rank),
        "parameters": plan.numel,
        "tp_coverage": plan.tp_coverage,
        "loss_in_head": plan.head is not None,
        "bytes": {
            "rank": of_rank(rank),
            "largest_rank": {"rank": largest, **of_rank(largest)},
            "all_ranks": held({p.fqn: p.numel * p.copies(sizes) for p in plan.params}),
        },
        "imbalance": {
            "ratio": plan.imbalance,
            "because": [asdict(group) for group in plan.uneven()],
        },
        "units": [asdict(unit) for unit in (*plan.units, plan.root)],
        "tied": plan.tied,
        "notes": list(plan.notes),
        "params": [_param_report(param, plan, rank) for param in plan.params],
    }


def _param_report(param: ParamPlan, plan: Plan, rank: int) -> dict[str, Any]:
    shape = param.local_shape(plan.sizes, rank)
    return {
        "fqn": param.fqn,
        "shape": list(param.shape),
        "dtype": str(param.dtype).removeprefix("torch."),
        "style": param.style,
        "unit": param.unit,
        "axes": list(param.axes),
        "placements": [str(p) for p in param.placements],
        "local_shape": list(shape),
        "boxes": [{"offsets": list(b.offsets), "shape": list(b.sizes)} for b in param.boxes(plan.sizes, rank)],
        "local_bytes": math.prod(shape) * param.dtype.itemsize,
    }


def _fold(report: dict[str, Any]) -> list[tuple[str, str, int, dict[str, Any]]]:
    """Rows in order, the same parameter of repeated layers folded into one: (FSDP unit, name in it, how many, row)."""
    policies = {unit["name"]: _policies(unit) for unit in report["units"]}
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for param in report["params"]:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", param["fqn"])
        place = (tuple(param["shape"]), tuple(param["local_shape"]), tuple(param["placements"]), param["style"])
        key = (pattern, policies[param["unit"]], *place)
        rows.setdefault(key, []).append(param)
    folded = []
    for (pattern, *_), params in rows.items():
        name, unit = params[0]["fqn"], params[0]["unit"]
        if len(params) > 1:
            layers = {int(m.group(1)) for p in params if (m := re.search(r"\.(\d+)\.", p["fqn"]))}
            name = pattern.replace("*", _span(sorted(layers)), 1)
            unit = re.sub(r"(?<=\.)\d+(?=\.|$)", _span(sorted(layers)), unit, count=1)
        title = f"{unit}: {policies[params[0]['unit']]}"
        folded.append((title, name.removeprefix(f"{unit}."), len(params), params[0]))
    return folded


def _policies(unit: dict[str, Any]) -> str:
    """What the unit does, as [fsdp.modules] would say it, and its compute dtype."""
    weights = "free_full_weight" if unit["reshard"] else "keep_full_weight"
    return ", ".join([weights, *(["cpu_offload"] if unit["cpu_offload"] else []), unit["param_dtype"]])


def _span(numbers: list[int]) -> str:
    """Numbers in order as `{0-2,5}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _plan_text(plan: Plan, report: dict[str, Any], rank: int) -> str:
    console = Console(width=240, highlight=False, color_system=None)
    place = ", ".join(f"{k} {v}" for k, v in report["coordinate"].items() if k not in ("fsdp", "batch"))
    with console.capture() as capture:
        console.print(f"{plan.model_type}: {plan.numel:,} parameters on {plan.sizes.describe()}", markup=False)
        console.print(f"rank {rank} of {plan.sizes.world_size}: {place}", markup=False)
        table = Table(box=None, pad_edge=False)
        for column in ("FSDP unit, parameters", "shape", "tp style", "placements", "on this rank", "bytes"):
            table.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=True)
        shown = None
        for unit, name, count, row in _fold(report):
            if unit != shown:
                table.add_row(unit)
                shown = unit
            axes = " ".join(f"{a}:{_short(p)}" for a, p in zip(row["axes"], row["placements"], strict=True))
            table.add_row(
                f"  {name}",
                "x".join(map(str, row["shape"])) or "scalar",
                row["style"],
                axes,
                "x".join(map(str, row["local_shape"])) or "scalar",
                size(row["local_bytes"] * count),
            )
        console.print(table, markup=False)
        for who in ("rank", "largest_rank", "all_ranks"):
            held = report["bytes"][who]
            label = {
                "rank": f"rank {rank}",
                "largest_rank": f"largest (rank {report['bytes']['largest_rank']['rank']})",
            }
            console.print(
                f"{label.get(who, 'all ranks'):>20}: {size(held['total'])} = parameters {size(held['parameters'])} + "
                f"gradients {size(held['gradients'])} + AdamW {size(held['optimizer'])}"
                + (f", {size(held['in_host_memory'])} of it in host memory" if held["in_host_memory"] else ""),
                markup=False,
            )
        if plan.imbalance > EVEN:
            console.print(_imbalance_text(plan), markup=False, soft_wrap=True)
        if plan.sizes.tp > 1:
            console.print(f"tensor parallelism cuts {100 * plan.tp_coverage:.1f} % of the parameters", markup=False)
        for note in plan.notes:
            console.print(f"note: {note}", markup=False)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _imbalance_text(plan: Plan) -> str:
    """Why the fullest rank holds more than the others: which parameters are cut into parts that differ."""
    reasons = []
    for group in plan.uneven():
        name = group.fqns[0]
        if len(group.fqns) > 1:
            layers = sorted({int(m.group(1)) for fqn in group.fqns if (m := re.search(r"\.(\d+)\.", fqn))})
            name = re.sub(r"(?<=\.)\d+(?=\.)", _span(layers), name, count=1)
        cuts = " and ".join(f"dim {dim} = {group.shape[dim]} over {over} ranks" for dim, over in group.dims.items())
        reasons.append(f"{name} has {cuts} and no other that divides ({group.excess / plan.mean_numel:+.0%})")
    return f"largest rank holds {plan.imbalance:.2f} times the mean: because {'; '.join(reasons)}"


def _short(placement: str) -> str:
    match = re.search(r"dim=(\d+)", placement) or re.search(r"\((\d+)", placement)
    return match.group(1) if match else "-"
