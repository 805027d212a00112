"""What the matrix knows and keeps: configs, saved models, outcomes, and the table made of them."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.matrix import worker
from tests.ranks import RankPool, RanksFailed

# Model type -> keyword arguments of a tiny config; and, for those that are not built, why.
HERE = Path(__file__).parent
CONFIGS: dict[str, dict[str, Any]] = json.loads((HERE / "configs.json").read_text())
UNBUILT: dict[str, str] = json.loads((HERE / "unbuilt.json").read_text())
STATUSES = ("agrees", "refused", "wrong", "crash", "hang")


def unknown_types() -> list[str]:
    """Causal LM types of the installed transformers that have neither a config nor a reason."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(CONFIGS) - set(UNBUILT))


def how_to_add(kinds: list[str]) -> str:
    """What to do about causal LM types that the matrix does not know."""
    return (
        f"transformers {transformers.__version__} has causal LM types that are not in the matrix: {', '.join(kinds)}. "
        "Add a tiny config of each to tests/matrix/configs.json and try it with "
        f"`OMP_NUM_THREADS=1 python -m tests.matrix --out DIR --types {' '.join(kinds)}`; "
        "one that cannot be built goes to tests/matrix/unbuilt.json with the reason"
    )


def absent(kind: str) -> str | None:
    """Why a type of the tables is passed over, which several versions of transformers share; None where it is not."""
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    return f"transformers {transformers.__version__} has no such causal LM type"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step: a run that is killed leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True))
    os.replace(part, path)


@cache
def commit() -> str:
    """The commit that is tried, with a mark where the working tree has changes."""
    named = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE)
    return named.stdout.strip() or "unknown"


class Results:
    """{type: {column: outcome}}, kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, kind: str, column: str) -> dict[str, Any] | None:
        return self.cells.get(kind, {}).get(column)

    def put(self, kind: str, column: str, outcome: dict[str, Any]) -> None:
        self.cells.setdefault(kind, {})[column] = {**outcome, "commit": commit()}
        write_json(self.path, self.cells)

    def forget(self, kind: str) -> None:
        if self.cells.pop(kind, None):
            write_json(self.path, self.cells)

    def has(self, column: str) -> bool:
        return any(column in row for row in self.cells.values())

    def due(self, kind: str, column: str, again: list[str]) -> bool:
        """Whether the cell is still to be computed, or its status is one of `again`."""
        before = self.get(kind, column)
        return before is None or before["status"] in again


def outcome(pool: RankPool, cell: Callable[..., dict[str, Any]], *args: Any, timeout: float) -> dict[str, Any]:
    """What the ranks of a cell agree on; a crash or a hang is an outcome too."""
    try:
        answers = pool.run(cell, *args, timeout=timeout)
    except (RanksFailed, OSError) as error:
        pool.close()
        text = str(error)
        last = [line.strip() for line in text.splitlines() if line and not line.startswith((" ", "rank"))]
        status = "hang" if "no answer" in text and "Traceback" not in text else "crash"
        return {"status": status, "what": (last or [text])[0][:300]}
    if len({a["status"] for a in answers}) > 1:
        return {"status": "wrong", "what": f"ranks disagree: {[a['status'] for a in answers]}"}
    return max(answers, key=lambda a: a.get("worst", 0.0))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every sweep over the types has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--types", nargs="+", default=sorted(CONFIGS), choices=sorted(CONFIGS), metavar="TYPE")
    made.add_argument("--again", nargs="+", default=[], choices=STATUSES)
    made.add_argument("--timeout", type=float, default=60, help="Seconds after which a cell hangs.")
    return made


def build_all(kinds: list[str], out: Path, *kept: Results, router_loss: bool = False) -> dict[str, Any]:
    """The saved models and their references, by type, {"error": …} for those that could not be built.

    A type whose config, length or router loss is another since is built again, and what `kept` has of it is forgotten.
    One that the installed transformers does not have is passed over, with a line that says so.
    """
    built_file = out / "built.json"
    built: dict[str, Any] = json.loads(built_file.read_text()) if built_file.exists() else {}
    pool = RankPool(1, cases=1000)
    for kind in kinds:
        made_of = {"config": CONFIGS[kind], "router_loss": router_loss, "seq": worker.SEQ}
        reason = absent(kind)
        if not reason and made_of.items() <= built.get(kind, {}).items():
            continue
        for results in kept:
            results.forget(kind)
        if reason:
            built[kind] = {"error": reason}
            write_json(built_file, built)
            print(f"passed over {kind}: {reason}", flush=True)
            continue
        shutil.rmtree(out / "models" / kind, ignore_errors=True)
        try:
            args = (kind, CONFIGS[kind], str(out / "models"), router_loss)
            built[kind] = pool.run(worker.build, *args, timeout=300)[0]
        except RanksFailed as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            built[kind] = {"error": lines[-1][:300]}
        built[kind] |= made_of
        write_json(built_file, built)
        print(f"built {kind} {built[kind].get('error', '')}", flush=True)
    pool.close()
    return built


def report(out: Path, meshes: list[str], ways: list[str], arguments: str, kinds: list[str] | None = None) -> str:
    """Markdown of everything that `out` has: one row a type, one column a mesh or a way of transformers' own.

    With `kinds` the rows are of these types alone.
    """
    built = {k: v for k, v in json.loads((out / "built.json").read_text()).items() if k in CONFIGS}
    ours, peer = Results(out / "results.json"), Results(out / "peer.json")
    columns = [(c, results) for names, results in ((meshes, ours), (ways, peer)) for c in names if results.has(c)]
    reasons: dict[str, int] = {}
    rows = []
    for kind in sorted(kinds or {*CONFIGS, *UNBUILT}):
        error = absent(kind) or UNBUILT.get(kind) or built.get(kind, {"error": "not tried yet"}).get("error")
        if error:
            rows.append([kind, f"no [{reasons.setdefault(error, len(reasons) + 1)}]", *("" for _ in columns)])
        else:
            rows.append([kind, "yes", *(_shown(results.get(kind, c), kind, reasons) for c, results in columns)])
    made = sum("error" not in built.get(kind, {"error": ""}) for kind in CONFIGS)
    lacking = [kind for kind in CONFIGS if absent(kind)]
    failed = len(CONFIGS) - len(lacking) - made
    unbuilt = sum(not absent(kind) for kind in UNBUILT)
    commits = {row[c].get("commit", "unknown") for c, results in columns for row in results.cells.values() if c in row}
    counts = []
    for column, results in columns:
        count = Counter(row[column]["status"] for row in results.cells.values() if column in row)
        counts.append([column, *(str(count[s]) for s in STATUSES), str(count.total())])
    return "\n".join(
        [
            f"torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}, "
            f"gloo, commit {', '.join(sorted(commits))}; "
            f"`OMP_NUM_THREADS=1 python -m tests.matrix --out DIR {arguments} --table FILE`.",
            "",
            f"transformers has {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} causal LM types. {made} are built here, "
            f"{failed} have a config that failed or was not tried, {unbuilt} cannot be built and "
            f"{len(unknown_types())} are new to the matrix. It lacks {len(lacking)} that have a config. Cells of each "
            "kind:",
            "",
            *_markdown(["", *STATUSES, "all"], counts),
            "",
            *_markdown(["type", "built", *(c for c, _ in columns)], rows),
            "",
            *(f"{number}. {text}" for text, number in reasons.items()),
            "",
        ]
    )


def _shown(found: dict[str, Any] | None, kind: str, reasons: dict[str, int]) -> str:
    """A cell: the largest relative difference, after its status and with its reason's number where it is not right."""
    if found is None:
        return ""
    if found["status"] == "agrees":
        looser = found["limit"] not in (worker.TOLERANCE, worker.LOW_TOLERANCE)
        text = f"agrees to {found['limit']:.0e}, plain transformers' own distance from float64"
        return f"{found['worst']:.0e}" + (f" [{reasons.setdefault(text, len(reasons) + 1)}]" if looser else "")
    names = {re.escape(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, kind)): "MODEL", re.escape(kind): "TYPE"}
    what = found["what"]
    for name, instead in names.items():
        what = re.sub(rf"\b{name}(?=\b|_)", instead, what)
    text = f"{found['status']}: {what}"
    error = f" {found['worst']:.0e}" if "worst" in found else ""
    return f"{found['status']}{error} [{reasons.setdefault(text, len(reasons) + 1)}]"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
