"""Write the plan as one self-contained HTML page."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from itertools import product
from typing import Any

from ndtrain.console.mesh_svg import colours, mesh_svg
from ndtrain.console.plan import BYTES, fold, remarks
from ndtrain.layout import held_of_dim
from ndtrain.mesh import MeshSizes
from ndtrain.plan import ParamPlan, Plan

# How a dim is cut: its elements, and the axes that cut it with their split factors.
Cut = tuple[int, tuple[tuple[str, int | None], ...]]


def page_html(plan: Plan, report: dict[str, Any], ranks_per_node: int) -> str:
    """Return the page of a `plan_report` of all parameters, and of its `step` if it has one."""
    sizes = plan.sizes
    title = f"{plan.model_type} on {sizes.describe()}"
    cuts: dict[Cut, int] = {}
    axes = {axis for param in plan.params for axis in param.axes} | set(sizes.axes)
    data = {
        "title": title,
        "parameters": plan.numel,
        "mesh": report["mesh"],
        "ranks_per_node": ranks_per_node,
        "rank": report["rank"],
        "axes": {axis: _axis(sizes, axis) for axis in (*sizes.axes, *sorted(axes - set(sizes.axes)))},
        "exchanging": sizes.axes,
        "bytes_per_element": BYTES,
        "units": _units(plan, report, cuts),
        "cuts": [_held(sizes, cut) for cut in cuts],
        "notes": [
            *(remark.removeprefix("note: ") for remark in remarks(plan, report)),
            *(f"tied: {alias} is {source}" for alias, source in plan.tied.items()),
        ],
        "step": report.get("step"),
    }
    template = files("ndtrain.console").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "title": escape(title),
        "mesh": mesh_svg(sizes, ranks_per_node),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # so that no string can end the script
    }
    for name, part in parts.items():
        template = template.replace(f"{{{{ {name} }}}}", part)
    return template


def _axis(sizes: MeshSizes, axis: str) -> dict[str, Any]:
    """Return the axis for the page: a rank's coordinate on it is rank // step % size."""
    group = sizes.group(axis, 0)
    return {"step": group.step, "size": len(group), "colours": colours(sizes, axis)}


def _units(plan: Plan, report: dict[str, Any], cuts: dict[Cut, int]) -> list[dict[str, Any]]:
    """Return the parameters by FSDP unit, repeated layers once; new ways of cutting a dim are added to `cuts`."""
    by_name = {param.fqn: param for param in plan.params}
    units: list[dict[str, Any]] = []
    for title, name, count, row in fold(report):
        if not units or units[-1]["title"] != title:
            units.append({"title": title, "params": []})
        param = by_name[row["fqn"]]
        units[-1]["params"].append(
            {
                "name": name,
                "count": count,
                "shape": param.shape,
                "dtype": row["dtype"],
                "style": param.style,
                "bytes": param.dtype.itemsize,
                "on_host": param.fqn in plan.on_host,
                "placements": [
                    f"{axis} cuts dim {dim}"
                    for dim in range(len(param.shape))
                    for axis, _ in _splits(param, dim, plan.sizes)
                ],
                "cuts": [_cut(param, dim, plan.sizes, cuts) for dim in range(len(param.shape))],
            }
        )
    return units


def _cut(param: ParamPlan, dim: int, sizes: MeshSizes, cuts: dict[Cut, int]) -> int | None:
    """Return the number in `cuts` of how the mesh cuts a dim, added if new; None if the dim is whole on every rank."""
    splits = _splits(param, dim, sizes)
    return cuts.setdefault((param.shape[dim], splits), len(cuts)) if splits else None


def _splits(param: ParamPlan, dim: int, sizes: MeshSizes) -> tuple[tuple[str, int | None], ...]:
    return tuple(
        (axis, getattr(placement, "split_factor", None))
        for axis, placement in zip(param.axes, param.placements, strict=True)
        if not placement.is_replicate()
        and placement.dim % len(param.shape) == dim  # type: ignore[attr-defined]
        and getattr(sizes, axis) > 1
    )


def _held(sizes: MeshSizes, cut: Cut) -> dict[str, Any]:
    """Return the intervals [a, b) that each coordinate holds, as a, b, a, b, ...; the first axis varies slowest."""
    elements, by = cut
    shape = [getattr(sizes, axis) for axis, _ in by]
    splits = {number: factor for number, (_, factor) in enumerate(by)}
    held = [
        [end for interval in held_of_dim(elements, shape, coordinate, splits) for end in interval]
        for coordinate in product(*map(range, shape))
    ]
    return {"axes": [axis for axis, _ in by], "held": held}
