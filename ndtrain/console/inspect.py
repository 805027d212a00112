"""The output of `ndtrain inspect`: the plan, its difference from another, and the cost of a step."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ndtrain.accelerators import Device, find_device
from ndtrain.console.mesh_svg import mesh_svg
from ndtrain.console.page import page_html
from ndtrain.console.plan import plan_lines, plan_report, plan_text
from ndtrain.console.progress import CountProgress
from ndtrain.console.units import number, size, span
from ndtrain.errors import RecipeError, counted
from ndtrain.estimate import (
    KINDS,
    RESERVED,
    TRIES,
    Change,
    StepEstimate,
    Suggestion,
    assumptions,
    estimate_plan,
    fixes,
    suggest,
)
from ndtrain.hf.model import meta_model
from ndtrain.plan import Plan, make_plan
from ndtrain.recipe import Recipe
from ndtrain.train import sizes_for, with_checkpoint, with_commit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def inspect_text(
    recipe: Recipe,
    *,
    world_size: int | None,
    rank: int = 0,
    as_json: bool = False,
    layer: str | None = None,
    other: Recipe | None = None,
    dry_run: bool = False,
    device: str | None = None,
    ranks_per_node: int = 8,
    html: Path | None = None,
    svg: Path | None = None,
) -> str:
    """Return the plan of `recipe` for `world_size` ranks, as tables or as JSON. Raises the errors that `run` would.

    `layer` shows only the parameters whose names match; `other` is a recipe to compare with; `dry_run` adds a step's
    memory, FLOPs and collectives, and `device` their time. Writes the page to `html` and the mesh's picture to `svg`.
    """
    target = _device(device, recipe) if device is not None else None
    recipe, plan, model = _planned(recipe, world_size, rank)
    report = plan_report(plan, recipe, rank=rank, ranks_per_node=ranks_per_node, layer=layer)
    if other is not None:
        other, theirs, _ = _planned(other, world_size, rank)
        there = plan_report(theirs, other, rank=rank, ranks_per_node=ranks_per_node, layer=layer)
        return json.dumps({"from": report, "to": there}, indent=2) if as_json else _difference(report, there)
    on_cuda = target is not None
    step = estimate_plan(recipe, plan, model, rank=rank, on_cuda=on_cuda) if dry_run or on_cuda else None
    if step is not None:
        report["step"] = step_report(step, target, ranks_per_node)
    if html is not None:
        _write(html, page_html(plan, report, ranks_per_node))
    if svg is not None:
        _write(svg, mesh_svg(plan.sizes, ranks_per_node))
    if as_json:
        return json.dumps(report, indent=2)
    text = plan_text(plan, report, rank)
    return text if step is None else f"{text}\n\n{_step_text(step, report['step'], target, ranks_per_node)}"


def _device(text: str, recipe: Recipe) -> Device:
    """Return the device of `--device`, as a run of `recipe` uses it."""
    found = find_device(text)
    return found.in_tf32() if recipe.train.tf32 else found


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path} cannot be written: {error.strerror}") from None


def _planned(recipe: Recipe, world_size: int | None, rank: int) -> tuple[Recipe, Plan, PreTrainedModel]:
    recipe = _source(recipe)
    sizes = sizes_for(recipe, world_size or recipe.mesh.least_ranks)
    if not 0 <= rank < sizes.world_size:
        raise RecipeError(f"--rank {rank} must be from 0 to {sizes.world_size - 1}")
    model = meta_model(recipe)
    return recipe, make_plan(model, sizes, recipe), model


def _source(recipe: Recipe) -> Recipe:
    """Return the recipe with what its `model.name` stands for."""
    recipe, _ = with_checkpoint(recipe)
    recipe, _ = with_commit(recipe, lambda work: work(), of_run=False)
    return recipe


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Return the lines of two plans that differ; repeated layers have one line."""
    lines = difflib.unified_diff(plan_lines(ours), plan_lines(theirs), lineterm="", n=0)
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return "\n".join(changed) or "the plans are the same"


def step_report(step: StepEstimate, device: Device | None, ranks_per_node: int) -> dict[str, Any]:
    """Return a step as JSON-ready data: bytes by kind, FLOPs, collectives; with a device also times in seconds."""
    (direction, unit), kinds = step.peak
    report: dict[str, Any] = {
        "peak": {"bytes": step.peak_bytes, "pass": direction, "unit": unit, "kinds": kinds},
        "peaks": [
            {"pass": way, "unit": name, "bytes": sum(held.values()), "kinds": held}
            for (way, name), held in step.peaks.items()
        ],
        "flops": {"executed": step.flops, "model": round(step.model_flops)},
        "collectives": [asdict(sent) for sent in step.sent(ranks_per_node)],
        "layers_run": None if step.depths is None else [step.depths.short, step.depths.long],
    }
    if device is not None:
        times = step.times(device, ranks_per_node)
        advice, failed = fixes(step.recipe, step, device, ranks_per_node) if step.room(device) < 0 else ([], [])
        now = step.plan.sizes.world_size * times.step
        on_node = min(ranks_per_node, step.plan.sizes.world_size)
        report["roofline"] = {
            "device": device.name,
            "source": device.source,
            "figures": device.figures,
            "ranks_per_node": ranks_per_node,
            "step_seconds": times.step,
            "compute_seconds": times.compute,
            "communication_seconds": times.sent,
            "exposed_seconds": times.exposed,
            "host_seconds": times.host,
            "host_exposed_seconds": times.host_exposed,
            "bound": times.bound,
            "tokens_per_second": step.tokens_per_second(times.step),
            "mfu": step.mfu(times.step, device),
            "memory_limit": round(device.memory * (1 - RESERVED)),
            "fits": step.room(device) >= 0,
            "fixes": [{**_suggestion_report(one, device), "cost": one.device_seconds / now} for one in advice],
            "fixes_failed": [asdict(one) for one in failed],
            "assumptions": assumptions(device, on_node),
        }
    return report


def suggest_text(recipe: Recipe, *, world_size: int, device: str, ranks_per_node: int, as_json: bool) -> str:
    """Return the fastest meshes for `world_size` ranks of `device` that are allowed and fit, as TOML or JSON.

    Shows on standard error how far the search is, if that is a terminal.
    """
    target = _device(device, recipe)
    recipe = _source(recipe)
    with CountProgress() as progress:
        search = suggest(
            recipe,
            world_size,
            target,
            ranks_per_node,
            progress=lambda done, total: progress("candidates searched", done, total),
        )
    assumed = assumptions(target, min(ranks_per_node, world_size))
    if as_json:
        report = {
            "device": target.name,
            "source": target.source,
            "figures": target.figures,
            "ranks_per_node": ranks_per_node,
            "searched": search.searched,
            "candidates": search.candidates,
            "too_big": search.too_big,
            "suggestions": [_suggestion_report(one, target) for one in search.found],
            "failed": [asdict(one) for one in search.failed],
            "assumptions": assumed,
        }
        return json.dumps(report, indent=2)
    lines = [f"An estimate for {world_size} x {target.name}, {counted(ranks_per_node, 'rank')} per node; fastest first"]
    for nth, one in enumerate(search.found, 1):
        lines += [
            "",
            f"# {nth}. at most {one.tokens_per_second:,.0f} tokens/s, MFU {one.step.mfu(one.times.step, target):.1%}, "
            f"bound by {one.times.bound}; {size(one.step.peak_bytes)} of {size(target.memory * (1 - RESERVED))}",
            *_recipe_lines(one.change),
        ]
    lines += ["", *(f"failed: {_keys(one.change)}: {one.reason}" for one in search.failed)]
    lines += [
        f"searched {search.searched:,} of {search.candidates:,} candidates, in the order of a rough estimate of their "
        f"time, by which {search.too_big:,} do not fit; of each mesh at most {TRIES} (the "
        "fastest, and the one that needs the least memory), and none after one that fits or fails",
        *(f"assumed: {line}" for line in assumed),
        *_device_lines(target),
    ]
    return "\n".join(lines)


def _device_lines(device: Device) -> list[str]:
    """Return every figure of the device that an estimate uses, and where they are from."""
    figures = ", ".join(f"{key} = {value:.4g}" for key, value in device.figures.items())
    return [f"{device.name}: {figures}", f"{device.name}: {device.source}"]


def _keys(change: Change) -> str:
    """Return `change` on one line, without axes of size 1."""
    kept = {key: value for key, value in change.items() if not key.startswith("mesh.") or value != 1}
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in kept.items())


def _suggestion_report(one: Suggestion, device: Device) -> dict[str, Any]:
    return {
        "set": one.change,
        "tokens_per_second": one.tokens_per_second,
        "step_seconds": one.times.step,
        "mfu": one.step.mfu(one.times.step, device),
        "bound": one.times.bound,
        "peak_bytes": one.step.peak_bytes,
    }


def _recipe_lines(change: Change) -> list[str]:
    """Return `change` as lines of TOML, without axes of size 1."""
    lines, section = [], ""
    for name, value in change.items():
        table, _, key = name.partition(".")
        if table == "mesh" and value == 1 and key != "dp_shard":
            continue
        if table != section:
            lines.append(f"[{table}]")
            section = table
        lines.append(f"{key} = {json.dumps(value)}")
    return lines


def _step_text(step: StepEstimate, report: dict[str, Any], device: Device | None, ranks_per_node: int) -> str:
    console = Console(width=160, highlight=False, color_system=None)
    with console.capture() as capture:
        (direction, unit), kinds = step.peak
        console.print(f"One step of rank {step.rank}, run on tensors without data", markup=False)
        where = f"{direction} of {unit}" if unit else direction
        console.print(f"  peak memory: {size(step.peak_bytes)}, in the {where}", markup=False)
        for kind in KINDS:
            if kinds.get(kind):
                console.print(f"    {kind.replace('_', ' '):<24}{size(kinds[kind]):>14}", markup=False)
        console.print(
            f"  FLOPs: {number(step.flops)}FLOP executed, {number(step.model_flops)}FLOP counted by MFU",
            markup=False,
        )
        table = Table(box=None, pad_edge=False)
        for column in ("  collectives over axis", "ranks", "nodes", "operation", "count", "bytes"):
            table.add_column(column, justify="left" if column.startswith("  ") or column == "operation" else "right")
        for sent in step.sent(ranks_per_node):
            table.add_row(
                f"  {sent.axis}", str(sent.ranks), str(sent.nodes), sent.op, f"{sent.count:,}", size(sent.bytes)
            )
        console.print(table, markup=False)
        if step.depths is not None:
            console.print(
                f"  note: run with {step.depths.short} and with {step.depths.long} layers; repeated layers are "
                "extrapolated",
                markup=False,
            )
        if device is not None:
            _print_times(console, step, report["roofline"], device)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _print_times(console: Console, step: StepEstimate, roofline: dict[str, Any], device: Device) -> None:
    lines = [
        f"An estimate for {device.name}, {counted(roofline['ranks_per_node'], 'rank')} per node",
        f"  step: at least {span(roofline['step_seconds'])}; computation {span(roofline['compute_seconds'])}",
    ]
    for axis, seconds in roofline["communication_seconds"].items():
        exposed = roofline["exposed_seconds"][axis]
        lines.append(f"  communication over {axis}: {span(seconds)}, {span(exposed)} exposed")
    for what, seconds in roofline["host_seconds"].items():
        lines.append(f"  cpu_offload, {what}: {span(seconds)}, {span(roofline['host_exposed_seconds'][what])} exposed")
    lines.append(
        f"  at most {roofline['tokens_per_second']:,.0f} tokens/s, MFU {roofline['mfu']:.1%}; bound by "
        f"{roofline['bound']}"
    )
    room, limit = step.room(device), size(roofline["memory_limit"])
    lines.append(
        f"  fits: {size(room)} of {limit} left" if room >= 0 else f"  does not fit: {size(-room)} more than {limit}"
    )
    if room < 0:
        lines += _fix_lines(roofline)
    lines += [f"  assumed: {line}" for line in roofline["assumptions"]]
    lines += [f"  {line}" for line in _device_lines(device)]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _fix_lines(roofline: dict[str, Any]) -> list[str]:
    failed = [f"    failed: {_keys(one['change'])}: {one['reason']}" for one in roofline["fixes_failed"]]
    if not roofline["fixes"]:
        return ["  no single change was found that makes it fit", *failed]
    lines = ["  single changes that make it fit, and their cost; least device time for each token first:"] + [
        f"    {_keys(fix['set'])}: {size(fix['peak_bytes'])}, at most {fix['tokens_per_second']:,.0f} tokens/s, "
        f"{_cost_text(fix['cost'])}"
        for fix in roofline["fixes"]
    ]
    return lines + failed


def _cost_text(cost: float) -> str:
    """Return a change of device time per token in words."""
    if cost >= 2:
        return f"{cost:,.1f} times the device time"
    return f"{abs(cost - 1):.0%} {'more' if cost >= 1 else 'less'} device time"
