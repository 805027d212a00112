"""Draw the mesh as an SVG picture: its ranks, node by node."""

from __future__ import annotations

import colorsys

from ndtrain.errors import counted
from ndtrain.mesh import MeshSizes

WIDTH = 890
COLUMNS = 8  # ranks side by side in a node
GAP = 2
PAD = 6
LABEL = 14  # height of the line above a node
# (largest number of ranks, side of a rank's square)
CELLS = ((16, 44), (128, 30), (2048, 14))
SMALLEST = 7


def colours(sizes: MeshSizes, axis: str) -> list[str]:
    """Return a colour for each coordinate on `axis`, light enough for dark text."""
    count = len(sizes.group(axis, 0))
    return [_colour(coordinate / count) for coordinate in range(count)]


def _colour(turn: float) -> str:
    red, green, blue = colorsys.hls_to_rgb((0.58 + 0.9 * turn) % 1, 0.72, 0.55)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def mesh_svg(sizes: MeshSizes, ranks_per_node: int) -> str:
    """Return an SVG with a square for each rank, a frame for each node, and a colour for each innermost coordinate.

    It is legible in light and in dark mode.
    """
    world, axes = sizes.world_size, sizes.axes
    cell = next((side for most, side in CELLS if world <= most), SMALLEST)
    columns = min(COLUMNS, ranks_per_node)
    step = cell + GAP
    wide = columns * step - GAP + 2 * PAD
    high = -(-min(ranks_per_node, world) // columns) * step - GAP + 2 * PAD
    nodes = -(-world // ranks_per_node)
    across = min(nodes, max(1, (WIDTH + PAD) // (wide + PAD)))
    down = -(-nodes // across)
    labelled = wide >= 60
    row = high + PAD + (LABEL if labelled else 0)
    inner = next((axis for axis in ("tp", "cp", "fsdp", "dp_replicate") if axis in axes), None)
    painted = colours(sizes, inner) if inner else [_colour(0)]

    lines = [f"{counted(world, 'rank')}: {sizes.describe()}"]
    for axis in axes:
        over = [nodes for _, nodes in sizes.spreads(axis, ranks_per_node)]
        up_to = "up to " if over[-1] < over[0] else ""
        where = "inside a node" if over[0] == 1 else f"across {up_to}{over[0]} nodes"
        same = "; one colour for each coordinate" if axis == inner else ""
        lines.append(f"{axis}: groups of {getattr(sizes, axis)}, {where}{same}")
    top = 20 * len(lines) + PAD
    width = max(across * (wide + PAD) - PAD, 8 * max(map(len, lines))) + 2
    height = top + down * row
    label = ". ".join(lines)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="ui-sans-serif, system-ui, sans-serif" role="img" aria-label="{label}">',
        "<style>.line{fill:#24292f}.node{fill:none;stroke:#8c959f}.number{fill:#111;text-anchor:middle}"
        "@media(prefers-color-scheme:dark){.line{fill:#e6edf3}}</style>",
        '<g class="legend">',
    ]
    for number, line in enumerate(lines):
        weight = ' font-weight="600"' if number == 0 else ""
        out.append(f'<text class="line" x="1" y="{15 + 20 * number}" font-size="14"{weight}>{line}</text>')
    out.append("</g>")
    for node in range(nodes):
        left, upper = 1 + node % across * (wide + PAD), top + node // across * row
        if labelled:
            out.append(f'<text class="line" x="{left}" y="{upper + 10}" font-size="11">node {node}</text>')
            upper += LABEL
        out.append(f'<rect class="node" x="{left}" y="{upper}" width="{wide}" height="{high}" rx="4"/>')
        for rank in range(node * ranks_per_node, min(world, (node + 1) * ranks_per_node)):
            y, x = divmod(rank % ranks_per_node, columns)
            coordinate = sizes.coordinate(rank)[inner] if inner else 0
            x, y = left + PAD + x * step, upper + PAD + y * step
            out.append(
                f'<rect class="rank" data-rank="{rank}" x="{x}" y="{y}" width="{cell}" height="{cell}" rx="2" '
                f'fill="{painted[coordinate]}"/>'
            )
            if cell >= 30:
                out.append(
                    f'<text class="number" x="{x + cell / 2:g}" y="{y + cell / 2 + 4:g}" font-size="12">{rank}</text>'
                )
    return "\n".join([*out, "</svg>", ""])
