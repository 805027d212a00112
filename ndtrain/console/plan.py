"""Show a plan as JSON-ready data and as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from rich.table import Table

from ndtrain.console.units import size
from ndtrain.errors import RecipeError, counted
from ndtrain.mesh import MeshSizes
from ndtrain.parallel import transforms_of
from ndtrain.plan import EVEN, ParamPlan, Plan
from ndtrain.recipe import Recipe

# Bytes of each element that a rank holds: float32 parameters and gradients, and AdamW's two moments, of which Muon has
# one for its matrices.
BYTES = {"parameters": 4, "gradients": 4, "optimizer": 8}


def plan_report(
    plan: Plan, recipe: Recipe, *, rank: int, ranks_per_node: int, layer: str | None = None
) -> dict[str, Any]:
    """Return the plan as JSON-ready data, with bytes of float32 parameters, gradients and optimizer state on ranks.

    `in_host_memory` is the part of a total that cpu_offload keeps off the device, `staging` the buffer in host memory
    (at most) that an asynchronous checkpoint is copied to. `layer` is a pattern that selects the parameters listed;
    raises `RecipeError` if none matches.
    """
    shown = [param for param in plan.params if layer is None or _matches(param.fqn, layer)]
    if not shown:
        raise RecipeError(f"--layer {layer} matches no parameter; one parameter is {plan.params[0].fqn}")
    sizes = plan.sizes
    largest, frozen = 0, frozenset(plan.frozen)  # see Plan.imbalance

    def held(numels: dict[str, int]) -> dict[str, int]:
        def bytes_of(fqns: Iterable[str]) -> dict[str, int]:
            whole = sum(numels[fqn] for fqn in fqns)
            trained = whole - sum(numels[fqn] for fqn in frozen.intersection(fqns))
            found = {kind: each * (whole if kind == "parameters" else trained) for kind, each in BYTES.items()}
            found["optimizer"] -= 4 * sum(numels[fqn] for fqn in plan.matrices.intersection(fqns) - frozen)
            if recipe.optim.state_dtype == "bfloat16":
                found["optimizer"] //= 2
            return found

        parts, hosted = bytes_of(numels), sum(bytes_of(plan.on_host & numels.keys()).values())
        staging = parts["parameters"] + parts["optimizer"] if recipe.checkpoint.async_ else 0
        return {**parts, "total": sum(parts.values()), "in_host_memory": hosted, "staging": staging}

    def of_rank(number: int) -> dict[str, int]:
        return held({p.fqn: p.local_numel(sizes, number) for p in plan.params})

    return {
        "model_type": plan.model_type,
        "mesh": {**asdict(sizes), "world_size": sizes.world_size, "fsdp": sizes.fsdp, "batch": sizes.batch},
        "rank": rank,
        "coordinate": sizes.coordinate(rank),
        "groups": [_group_report(sizes, axis, rank, ranks_per_node) for axis in sizes.axes],
        "parameters": plan.numel,
        "trained": plan.numel - sum(p.numel for p in plan.params if p.fqn in frozen),
        "tp_coverage": plan.tp_coverage,
        "loss_in_head": plan.head is not None,
        "transforms": [transform.name for transform in transforms_of(plan, recipe)],
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
        "notes": [*plan.notes, *_open(recipe)],
        "params": [_param_report(param, plan, rank) for param in shown],
    }


def _open(recipe: Recipe) -> Iterator[str]:
    """Yield a note on what only a run shows."""
    if recipe.train.compile:
        yield "train.compile = true: memory and times are those of uncompiled blocks"
    if recipe.train.epochs is not None:
        yield (
            f"train.epochs = {recipe.train.epochs}: how many steps that is, and with it the schedule, follows from the "
            "number of samples, which a run prints once it has tokenized the data"
        )
    elif recipe.data.stop != "never":
        yield (
            f'data.stop = "{recipe.data.stop}": the run may end before train.steps: the number of samples says, and '
            "with it the schedule is known"
        )


def _group_report(sizes: MeshSizes, axis: str, rank: int, ranks_per_node: int) -> dict[str, Any]:
    """Return the group of `rank` along `axis`: ranks first, first + step, ..., last, and the number of nodes."""
    group = sizes.group(axis, rank)
    _, nodes = sizes.spread(axis, rank, ranks_per_node)
    return {
        "axis": axis,
        "ranks": len(group),
        "first": group[0],
        "step": group.step,
        "last": group[-1],
        "nodes": nodes,
    }


def _matches(fqn: str, pattern: str) -> bool:
    """Return whether `pattern` matches the name or that of a module around it."""
    parts = fqn.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def plan_lines(report: dict[str, Any]) -> list[str]:
    """Return the plan as lines that can be compared with those of another plan."""
    lines = [f"mesh: {', '.join(f'{axis} {n}' for axis, n in report['mesh'].items())}"]
    lines += [_group_text(group) for group in report["groups"]]
    lines.append(f"transforms: {', '.join(report['transforms'])}")
    for unit, name, count, row in fold(report):
        cut = " ".join(f"{a}:{_short(p)}" for a, p in zip(row["axes"], row["placements"], strict=True))
        local = "x".join(map(str, row["local_shape"]))
        held = size(row["local_bytes"] * count)
        lines.append(f"{unit.replace(': ', f'.{name}: ', 1)}, {row['style']}, {cut}, {local} on this rank, {held}")
    for who, held in report["bytes"].items():
        lines += [f"{who.replace('_', ' ')}: {kind} {size(n)}" for kind, n in held.items() if kind != "rank"]
    return lines + [f"note: {note}" for note in report["notes"]]


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


def fold(report: dict[str, Any]) -> list[tuple[str, str, int, dict[str, Any]]]:
    """Return rows (FSDP unit, name in it, number of layers, parameter), repeated layers folded into one row."""
    units = {unit["name"]: unit for unit in report["units"]}
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for param in report["params"]:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", param["fqn"])
        cut = (tuple(param["shape"]), tuple(param["local_shape"]), tuple(param["placements"]), param["style"])
        key = (pattern, _policies(units[param["unit"]], param), *cut)
        rows.setdefault(key, []).append(param)
    folded = []
    for (pattern, *_), params in rows.items():
        name, unit = params[0]["fqn"], params[0]["unit"]
        if len(params) > 1:
            layers = {int(m.group(1)) for p in params if (m := re.search(r"\.(\d+)\.", p["fqn"]))}
            name = pattern.replace("*", _span(sorted(layers)), 1)
            unit = re.sub(r"(?<=\.)\d+(?=\.|$)", _span(sorted(layers)), unit, count=1)
        title = f"{unit}: {_policies(units[params[0]['unit']], params[0])}"
        folded.append((title, name.removeprefix(f"{unit}."), len(params), params[0]))
    return folded


def _policies(unit: dict[str, Any], param: dict[str, Any]) -> str:
    """Return the policies of a parameter's unit in the words of [fsdp.modules], and its own compute dtype."""
    weights = "free_full_weight" if unit["reshard"] else "keep_full_weight"
    dtype = "float32" if param["fqn"] in unit["in_float32"] else unit["param_dtype"]
    return ", ".join([weights, *(["cpu_offload"] if unit["cpu_offload"] else []), dtype])


def _span(numbers: list[int]) -> str:
    """Return sorted numbers as `{0-2,5}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def plan_text(plan: Plan, report: dict[str, Any], rank: int) -> str:
    console = Console(width=240, highlight=False, color_system=None)
    coordinate = ", ".join(f"{k} {v}" for k, v in report["coordinate"].items() if k not in ("fsdp", "batch"))
    with console.capture() as capture:
        console.print(f"{plan.model_type}: {plan.numel:,} parameters on {plan.sizes.describe()}", markup=False)
        console.print(f"rank {rank} of {plan.sizes.world_size}: {coordinate}", markup=False)
        for group in report["groups"]:
            console.print(f"  {_group_text(group)}", markup=False)
        console.print(f"transforms, in this order: {', '.join(report['transforms'])}", markup=False)
        table = Table(box=None, pad_edge=False)
        for column in ("FSDP unit, parameters", "shape", "tp style", "placements", "on this rank", "bytes"):
            table.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=True)
        shown = None
        for unit, name, count, row in fold(report):
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
                f"gradients {size(held['gradients'])} + optimizer {size(held['optimizer'])}"
                + (f", {size(held['in_host_memory'])} of it in host memory" if held["in_host_memory"] else "")
                + (f"; {size(held['staging'])} in host memory for checkpoints" if held["staging"] else ""),
                markup=False,
            )
        for remark in remarks(plan, report):
            console.print(remark, markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def remarks(plan: Plan, report: dict[str, Any]) -> list[str]:
    """Return the lines about the whole plan: imbalance, coverage of tensor parallelism, notes."""
    lines = [_imbalance_text(plan)] if plan.imbalance > EVEN else []
    if plan.sizes.tp > 1:
        lines.append(f"tensor parallelism cuts {100 * plan.tp_coverage:.1f} % of the parameters")
    return [*lines, *(f"note: {note}" for note in report["notes"])]


def _group_text(group: dict[str, Any]) -> str:
    """Return a line about a rank's group along an axis: its ranks and its nodes."""
    first, step, last = group["first"], group["step"], group["last"]
    if step == 1 or group["ranks"] == 2:
        members = f"{first}{'-' if step == 1 else ', '}{last}"
    else:
        members = f"{first}, {first + step}, ..., {last}" if group["ranks"] > 3 else f"{first}, {first + step}, {last}"
    nodes = "on one node" if group["nodes"] == 1 else f"over {group['nodes']} nodes"
    return f"{group['axis']}: {counted(group['ranks'], 'rank')} {nodes} ({members})"


def _imbalance_text(plan: Plan) -> str:
    """Return why the fullest rank holds more than the mean: the parameters that are cut unevenly."""
    reasons = []
    for group in plan.uneven():
        name = group.fqns[0]
        if len(group.fqns) > 1:
            layers = sorted({int(m.group(1)) for fqn in group.fqns if (m := re.search(r"\.(\d+)\.", fqn))})
            name = re.sub(r"(?<=\.)\d+(?=\.)", _span(layers), name, count=1)
        cuts = " and ".join(f"dim {dim} = {group.shape[dim]} over {over} ranks" for dim, over in group.dims.items())
        reasons.append(
            f"{name} has {cuts}, uneven, and no dim that divides evenly ({group.excess / plan.mean_numel:+.0%})"
        )
    return f"largest rank holds {plan.imbalance:.2f} times the mean, because {'; '.join(reasons)}"


def _short(placement: str) -> str:
    match = re.search(r"dim=(\d+)", placement) or re.search(r"\((\d+)", placement)
    return match.group(1) if match else "-"
