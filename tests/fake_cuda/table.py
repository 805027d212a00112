"""The command: steps of many models on many meshes, their table, and the golden counts."""

from __future__ import annotations

import argparse
import json
import traceback
from collections import Counter
from pathlib import Path

import torch
import transformers

from ndtrain.errors import NdtrainError, one_line
from tests import fake_cuda
from tests.fake_cuda.cases import FAMILIES, GOLDEN, MESHES, RECIPES, fits, sections
from tests.fake_cuda.faults import FAULTS
from tests.fake_cuda.steps import LENGTH, Counts, counted, found_in

Cells = dict[tuple[str, str], Counts | str]


def main() -> None:
    parser = argparse.ArgumentParser(description=fake_cuda.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--types", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--meshes", nargs="*", default=list(MESHES), choices=list(MESHES))
    parser.add_argument("--table", type=Path, help="Write the read-backs of the types on the meshes to this file.")
    parser.add_argument("--golden", action="store_true", help="Write the counts of the golden recipes to golden.json.")
    parser.add_argument("--faults", action="store_true", help="Print as JSON what is found of code with faults.")
    parser.add_argument("--json", type=Path, help="Write the counts of the golden recipes to this file.")
    parser.add_argument("--length", type=int, default=LENGTH, help="Tokens of a row.")
    options = parser.parse_args()
    if options.faults:
        print(json.dumps({name: found_in(fault) for name, fault in FAULTS.items()}))
        return
    if options.golden or options.json is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        found = {"versions": versions, "counts": {name: _golden(name) for name in RECIPES}}
        (GOLDEN if options.golden else options.json).write_text(json.dumps(found, indent=2) + "\n")
        return
    cells = {
        (kind, mesh): _cell(kind, mesh, options.length)
        for kind in options.types
        for mesh in options.meshes
        if fits(kind, mesh)
    }
    if options.table is not None:
        options.table.write_text(_table(cells, options.types, options.meshes))


def _golden(name: str) -> dict[str, int]:
    kind, mesh = RECIPES[name]
    return counted(kind, MESHES[mesh][0], sections(kind, mesh)).golden


def _cell(kind: str, mesh: str, length: int) -> Counts | str:
    """Return the counts of a step, or why there is none, and print them."""
    try:
        found = counted(kind, MESHES[mesh][0], sections(kind, mesh), length=length)
    except NdtrainError as error:
        print(f"{mesh} {kind}: refused: {one_line(error)}", flush=True)
        return "refused"
    except Exception as error:
        print(f"{mesh} {kind}: FAILS", flush=True)
        traceback.print_exception(error)
        return "fails"
    print(f"{mesh} {kind}: {found.golden}", flush=True)
    for where, times in found.read_backs.items():
        print(f"    {times} x {where}", flush=True)
    return found


def _table(cells: Cells, kinds: list[str], meshes: list[str]) -> str:
    def shown(cell: Counts | str | None) -> str:
        return str(sum(cell.read_backs.values())) if isinstance(cell, Counts) else cell or ""

    places: Counter[str] = Counter()
    for cell in cells.values():
        if isinstance(cell, Counts):
            places.update(cell.read_backs)
    lines = [
        "# Read-backs of a step on a fake CUDA device",
        "",
        "Written by `python -m tests.fake_cuda --table tests/FAKE_CUDA.md`: how often the host waits for the device in",
        "the second step of two micro batches, on rank 0, in bfloat16. An operation that mixes devices fails.",
        "",
        "| type | " + " | ".join(meshes) + " |",
        "|" + "---|" * (1 + len(meshes)),
        *(f"| {kind} | " + " | ".join(shown(cells.get((kind, mesh))) for mesh in meshes) + " |" for kind in kinds),
        "",
        "All places, with their times over all cells:",
        "",
        *(
            f"- {times} x {where.split(': ', 1)[0]}: `{where.split(': ', 1)[-1]}`"
            for where, times in places.most_common()
        ),
    ]
    return "\n".join(lines) + "\n"
