"""A part of the suite (every mesh axis, resume, convert, the dry step) on other versions of torch and transformers.

    python -m tests.versions --out DIR [--pairs 2.11.0,5.23.0 2.14.1,5.24.0] [--table tests/VERSIONS.md]

Each pair gets a venv of its own under DIR, which is kept and used again. The pairs are the lowest versions that
pyproject.toml allows and the newest that the suite was run on: move its upper bounds with them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ["2.11.0,5.23.0", "2.14.1,5.24.0"]
PART = [
    "tests/test_private_names.py",
    "tests/test_context_parallel.py",
    "tests/test_matrix.py",
    "tests/test_train.py::test_every_mesh_trains_like_plain_transformers",
    "tests/test_train.py::test_options_train_like_plain_transformers",
    "tests/test_resume.py",
    "tests/test_convert.py",
    "tests/test_estimate.py",
]
# What the part needs beside the package.
NEEDS = ["pytest>=8", "pytest-timeout", "psutil", "accelerate"]


def python_of(folder: Path, torch: str, transformers: str) -> Path:
    """Return the interpreter of the venv with these versions, which is made where there is none."""
    venv = folder / f"torch{torch}-transformers{transformers}"
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pins = [f"torch=={torch}", f"transformers=={transformers}"]
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--no-compile", *pins, "-e", str(ROOT), *NEEDS], check=True
    )
    return python


def tried(python: Path) -> str:
    """Return the line with which pytest closes on the part of the suite."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *PART]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "E   ")):
            print(line, flush=True)
    return lines[-1] if lines else done.stderr[-300:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="TORCH,TRANSFORMERS")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    rows = ["| torch | transformers | Python | pytest | s |", "|---|---|---|---|---|"]
    for pair in options.pairs:
        torch, transformers = pair.split(",")
        started = time.monotonic()
        line = tried(python_of(options.out, torch, transformers))
        rows.append(
            f"| {torch} | {transformers} | {sys.version.split()[0]} | {line} | {time.monotonic() - started:.0f} |"
        )
        print(rows[-1], flush=True)
    text = [
        f"Commit {commit.stdout.strip()}; `python -m tests.versions --out DIR --table tests/VERSIONS.md`.",
        "",
        *rows,
    ]
    if options.table is not None:
        options.table.write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    main()
