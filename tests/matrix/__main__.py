"""Every causal LM type of transformers on every kind of mesh, against plain single-process transformers.

    OMP_NUM_THREADS=1 python -m tests.matrix --out DIR [--types llama qwen3] [--meshes tp2 cp2-ulysses] [--peer]

Results are kept in DIR/results.json and not computed again, so that a run that was cut off goes on where it was;
`--again wrong crash` does those again, and a type whose config has changed begins anew. With `--peer` transformers' own
parallelism follows (tests/matrix/peer.py). With `--table FILE` the table is written. One group of ranks serves many
models; after a crash or a hang (60 s) a fresh one takes its place.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tests.matrix import peer, worker
from tests.matrix.results import (
    CONFIGS,
    UNBUILT,
    Results,
    build_all,
    how_to_add,
    outcome,
    parser,
    report,
    unknown_types,
)
from tests.ranks import RankPool

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


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--meshes", nargs="*", default=list(MESHES), choices=list(MESHES))
    arguments.add_argument("--peer", action="store_true", help="transformers' own parallelism too.")
    arguments.add_argument("--bfloat16", action="store_true", help="Compute in bfloat16; compare losses and norms.")
    arguments.add_argument("--router-loss", action="store_true", help="With the router's auxiliary loss.")
    arguments.add_argument("--table", type=Path)
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results, peers = Results(options.out / "results.json"), Results(options.out / "peer.json")
    print(f"{len(CONFIGS)} types, {len(UNBUILT)} that cannot be built", flush=True)
    if unknown := unknown_types():
        print(how_to_add(unknown), flush=True)
    built = build_all(options.types, options.out, results, peers, router_loss=options.router_loss)
    pools: dict[int, RankPool] = {}
    for name in options.meshes:
        mesh, more = MESHES[name]
        if options.bfloat16:
            more = {**more, "fsdp": {"param_dtype": "bfloat16"}}
        ranks = math.prod(size for axis, size in mesh.items() if axis != "ep")
        for kind in options.types:
            if "error" in built[kind] or not results.due(kind, name, options.again):
                continue
            if ranks not in pools:
                for other in pools.values():
                    other.close()  # waiting ranks take memory
                pools = {ranks: RankPool(ranks, cases=1000)}
            found = outcome(pools[ranks], worker.cell, built[kind], mesh, more, timeout=options.timeout)
            results.put(kind, name, found)
            print(
                f"{name} {kind}: {found['status']} {found.get('worst', '')} {found.get('what', '')}"
                + (" (sequence parallel)" if found.get("sequence_parallel") else ""),
                flush=True,
            )
    for pool in pools.values():
        pool.close()
    if options.peer:
        keys = {"kinds": options.types, "again": options.again, "timeout": options.timeout}
        peer.run(built, peers, ways=list(peer.WAYS), **keys)
    if options.table:
        arguments = ["--bfloat16"] * options.bfloat16 + ["--peer"] * options.peer
        some = options.types if len(options.types) < len(CONFIGS) else None
        if some:
            arguments += ["--meshes", *options.meshes, "--types", *some]
        options.table.write_text(report(options.out, list(MESHES), list(peer.WAYS), " ".join(arguments), some))


if __name__ == "__main__":
    main()
