"""Options of a step alone and in pairs that touch one another, on each axis, against the same options on one rank.

    OMP_NUM_THREADS=1 python -m tests.option_pairs --table tests/OPTION_PAIRS.md

What changes the arithmetic (the optimizer, its state, its groups) is set on one rank too; what must not change it
(where gradients are added up, what is recomputed, compiled or kept on the host) is left out there. Losses and gradient
norms of four steps are compared: to 1e-4, or 5e-3 where bfloat16 rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tests import tiny
from tests.ranks import get_pool
from tests.test_train import ALL_MESHES, ranks_of, trained

FROZEN = {"match": ["model.embed_tokens", "model.layers.0.self_attn"], "frozen": True}
SLOWER = {"match": ["model.layers.*.mlp"], "lr": 0.002, "weight_decay": 0.5}
# Name -> what it sets, and whether one rank needs it too.
OPTIONS: dict[str, tuple[dict[str, Any], bool]] = {
    "muon": ({"optim": {"name": "muon"}}, True),
    "state in bfloat16": ({"optim": {"state_dtype": "bfloat16"}}, True),
    "groups": ({"optim": {"groups": [FROZEN, SLOWER]}}, True),
    "local gradients": ({"fsdp": {"accumulate": "local"}}, False),
    "sharded gradients": ({"fsdp": {"accumulate": "sharded"}}, False),
    "selective": ({"train": {"activation_checkpointing": "selective"}}, False),
    "full": ({"train": {"activation_checkpointing": "full"}}, False),
    "offload": ({"train": {"activation_checkpointing": "offload"}}, False),
    "one block in two": ({"train": {"activation_checkpointing": {"every": 2}}}, False),
    "cpu_offload": ({"fsdp": {"cpu_offload": True}}, False),
    "kept gathered": ({"fsdp": {"reshard_after_forward": False}}, False),
    "compile": ({"train": {"compile": True}}, False),
    "masks": ({"model": {"attn": "sdpa"}}, False),
}
PAIRS = [
    ("compile", "selective"),
    ("compile", "muon"),
    ("muon", "local gradients"),
    ("muon", "state in bfloat16"),
    ("muon", "groups"),
    ("muon", "cpu_offload"),
    ("state in bfloat16", "cpu_offload"),
    ("groups", "full"),
    ("groups", "local gradients"),
    ("local gradients", "cpu_offload"),
    ("offload", "local gradients"),
    ("selective", "kept gathered"),
    ("selective", "masks"),
    ("one block in two", "groups"),
]
MESHES = {"dp_shard2": "llama", "tp2": "llama", "cp2": "llama", "ep2": "qwen3_moe_normed"}


def merged(names: tuple[str, ...], *, of_one_rank: bool) -> dict[str, Any]:
    """The sections of a recipe that these options set."""
    found: dict[str, Any] = {}
    for name in names:
        sections, everywhere = OPTIONS[name]
        if everywhere or not of_one_rank:
            for section, keys in sections.items():
                found[section] = found.get(section, {}) | keys
    return found


def run(folder: Path, model: Path, mesh: str, sections: dict[str, Any]) -> list[tuple[float, float]]:
    folder.mkdir(parents=True)
    sizes = ALL_MESHES[mesh]
    recipe = tiny.recipe_file(
        folder / "recipe.toml",
        corpus=folder.parents[1] / "corpus",
        run_dir=folder / "run",
        mesh=sizes,
        steps=4,
        accumulation=2,
        batch_ranks=sizes.get("dp_shard", 1),
        **{**sections, "model": {"name": str(model), **sections.get("model", {})}},
    )
    metrics = get_pool(ranks_of(sizes)).run(trained, str(recipe), [], timeout=400)[0]["metrics"]
    return [(one["loss"], one["grad_norm"]) for one in metrics]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--only", nargs="+", choices=OPTIONS, help="Combinations that have one of these.")
    options = parser.parse_args()
    combinations: list[tuple[str, ...]] = [*((name,) for name in OPTIONS), *PAIRS]
    if options.only:
        combinations = [names for names in combinations if set(names) & set(options.only)]
    lines = [f"| | {' | '.join(MESHES)} |", f"|---|{'---|' * len(MESHES)}"]
    bad = 0
    with tempfile.TemporaryDirectory() as own:
        root = Path(own)
        tiny.write_corpus(root / "corpus")
        models = {kind: tiny.save_model(kind, root) for kind in set(MESHES.values())}
        alone: dict[Any, list[tuple[float, float]]] = {}
        for number, names in enumerate(combinations):
            cells = []
            for mesh, kind in MESHES.items():
                math = merged(names, of_one_rank=True)
                key = kind, repr(math)
                if key not in alone:
                    alone[key] = run(root / f"alone{len(alone)}" / "1", models[kind], "1", math)
                try:
                    found = run(root / f"{number}" / mesh, models[kind], mesh, merged(names, of_one_rank=False))
                except Exception as error:
                    cells.append(f"failed: {str(error).splitlines()[-1][:120]}")
                    bad += 1
                    continue
                worst = max(
                    abs(a - b) / abs(b)
                    for ours, theirs in zip(found, alone[key], strict=True)
                    for a, b in zip(ours, theirs, strict=True)
                )
                rounds = {"muon", "state in bfloat16"} & {*names}
                bad += worst > (5e-3 if rounds else 1e-4)
                cells.append(f"{worst:.0e}" + (" **wrong**" if worst > (5e-3 if rounds else 1e-4) else ""))
            lines.append(f"| {', '.join(names)} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if options.table:
        head = (__doc__ or "").strip().splitlines()
        options.table.write_text("\n".join(["# " + head[0], "", *head[1:], "", *lines, ""]))
    if bad:
        raise SystemExit(f"{bad} cells are wrong or failed")


if __name__ == "__main__":
    main()
