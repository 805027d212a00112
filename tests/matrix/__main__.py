"""Every causal LM type of transformers on every kind of mesh, against plain single-process transformers.

    OMP_NUM_THREADS=1 python -m tests.matrix --out DIR [--types llama qwen3] [--meshes tp2 cp2-ulysses]

Results are kept in DIR/results.json and not computed again; `--again wrong crash` does those again. With `--table FILE`
the table is written. One group of ranks serves many models; after a crash or a hang (60 s) a fresh one takes its place.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from tests.matrix import worker
from tests.ranks import RankPool, RanksFailed

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "configs.json").read_text())
ULYSSES, RING = {"cp": {"kind": "ulysses"}}, {"cp": {"kind": "ring"}}
MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp_shard2": ({"dp_shard": 2}, {}),
    "tp2": ({"tp": 2}, {}),
    "cp2-ulysses": ({"cp": 2}, ULYSSES),
    "cp2-ring": ({"cp": 2}, RING),
    "dp_shard2-tp2": ({"dp_shard": 2, "tp": 2}, {}),
    "dp_shard2-cp2": ({"dp_shard": 2, "cp": 2}, {}),
    "cp2-tp2": ({"cp": 2, "tp": 2}, {}),
    "dp_replicate2-dp_shard2": ({"dp_replicate": 2, "dp_shard": 2}, {}),
    "ep2": ({"dp_shard": 2, "ep": 2}, {}),
    "dp_shard2-tp2-ep4": ({"dp_shard": 2, "tp": 2, "ep": 4}, {}),
    "dp_shard2-cp2-ep4": ({"dp_shard": 2, "cp": 2, "ep": 4}, {}),
}


class Results:
    """{type: {mesh: outcome}}, kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, kind: str, mesh: str) -> dict[str, Any] | None:
        return self.cells.get(kind, {}).get(mesh)

    def put(self, kind: str, mesh: str, outcome: dict[str, Any]) -> None:
        self.cells.setdefault(kind, {})[mesh] = outcome
        self.path.write_text(json.dumps(self.cells, indent=1, sort_keys=True))


def outcome(pool: RankPool, *args: Any) -> dict[str, Any]:
    """What the ranks of a cell agree on; a crash or a hang is an outcome too."""
    try:
        answers = pool.run(worker.cell, *args, timeout=60)
    except RanksFailed as error:
        text = str(error)
        last = [line.strip() for line in text.splitlines() if line and not line.startswith((" ", "rank"))]
        status = "hang" if "no answer" in text and "Traceback" not in text else "crash"
        return {"status": status, "what": (last or [text])[0][:300]}
    kinds = {a["status"] for a in answers}
    if len(kinds) > 1:
        return {"status": "wrong", "what": f"ranks disagree: {[a['status'] for a in answers]}"}
    return max(answers, key=lambda a: a.get("worst", 0.0))


def build_all(kinds: list[str], out: Path, results: Results, *, router_loss: bool) -> dict[str, Any]:
    """The saved models and their references; types that cannot be built are noted under "built"."""
    built_file = out / "built.json"
    built: dict[str, Any] = json.loads(built_file.read_text()) if built_file.exists() else {}
    pool = RankPool(1, cases=1000)
    for kind in kinds:
        if kind in built:
            continue
        try:
            args = (kind, CONFIGS[kind], str(out / "models"), router_loss)
            built[kind] = pool.run(worker.build, *args, timeout=120)[0]
            results.put(kind, "built", {"status": "agrees"})
        except RanksFailed as error:
            line = next((s for s in reversed(str(error).splitlines()) if s.strip()), "")
            results.put(kind, "built", {"status": "refused", "what": line.strip()[:300]})
        built_file.write_text(json.dumps(built, indent=1))
    pool.close()
    return built


def table(results: Results) -> str:
    """Markdown: one row a type, one column a mesh."""
    names = [m for m in MESHES if any(m in row for row in results.cells.values())]
    lines = ["| type | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    reasons: dict[str, int] = {}
    for kind in sorted(results.cells):
        row = []
        for mesh in names:
            found = results.get(kind, mesh)
            if found is None:
                row.append("")
            elif found["status"] == "agrees":
                row.append(f"{found['worst']:.0e}")
            else:
                text = f"{found['status']}: {found['what'].replace(kind, 'TYPE')}"
                row.append(f"{found['status']} [{reasons.setdefault(text, len(reasons) + 1)}]")
        lines.append(f"| {kind} | " + " | ".join(row) + " |")
    counts = []
    for mesh in names:
        count = Counter(row[mesh]["status"] for row in results.cells.values() if mesh in row)
        counts.append(f"| {mesh} | " + " | ".join(str(count[s]) for s in STATUSES) + " |")
    head = ["| mesh | " + " | ".join(STATUSES) + " |", "|---" * (len(STATUSES) + 1) + "|"]
    notes = [f"{number}. {text}" for text, number in reasons.items()]
    return "\n".join([*head, *counts, "", *lines, "", *notes, ""])


STATUSES = ("agrees", "refused", "wrong", "crash", "hang")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=sorted(CONFIGS), choices=sorted(CONFIGS), metavar="TYPE")
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
    parser.add_argument("--again", nargs="+", default=[], choices=STATUSES)
    parser.add_argument("--router-loss", action="store_true", help="with the router's auxiliary loss")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.json")
    built = build_all(options.types, options.out, results, router_loss=options.router_loss)
    pools: dict[int, RankPool] = {}
    for name in options.meshes:
        mesh, more = MESHES[name]
        ranks = math.prod(size for axis, size in mesh.items() if axis != "ep")
        for kind in options.types:
            before = results.get(kind, name)
            if kind not in built or (before and before["status"] not in options.again):
                continue
            if ranks not in pools:
                for other in pools.values():
                    other.close()  # waiting ranks take memory
                pools = {ranks: RankPool(ranks, cases=1000)}
            found = outcome(pools[ranks], built[kind], mesh, more)
            results.put(kind, name, found)
            print(f"{name} {kind}: {found['status']} {found.get('worst', '')} {found.get('what', '')}", flush=True)
    for pool in pools.values():
        pool.close()
    if options.table:
        options.table.write_text(table(results))


if __name__ == "__main__":
    main()
