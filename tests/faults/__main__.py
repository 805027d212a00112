"""Let a fault happen on one rank in each phase of a run, and see how all ranks end.

OMP_NUM_THREADS=1 python -m tests.faults --out DIR [--jobs N] [--log tests/faults/LOG.md]
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.faults.run import LIMITS, check_end, disturbed, prepare
from tests.faults.worker import FUNCTIONS

FAULTS = ("error", "stop", "kill")
# Errors that have a name or an exit code of their own, rank 0, and ranks that torchrun itself starts.
MORE = (
    ("checking the model on noise", "memory", 1, False),
    ("reading the weights", "damaged", 1, False),
    ("checking the model on noise", "sleep", 1, False),
    ("tokenizing", "error", 0, False),
    ("checking the model on noise", "stop", 0, False),
    ("checking the model on noise", "kill", 0, False),
    ("filling the model with noise", "error", 1, True),
    ("checking the model on noise", "stop", 1, True),
    ("checking the model on noise", "kill", 1, True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phase", choices=FUNCTIONS, action="append")
    parser.add_argument("--fault", choices=(*FAULTS, "sleep"), action="append")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    prepare(options.out)
    cases = [
        (phase, fault, options.rank, False) for phase in options.phase or FUNCTIONS for fault in options.fault or FAULTS
    ]
    if not (options.phase or options.fault):
        cases += MORE
    rows, failed = [], 0
    pool = ThreadPoolExecutor(options.jobs)
    ends = pool.map(lambda case: disturbed(options.out, *case[:2], rank=case[2], torchrun=case[3]), cases)
    for (phase, fault, rank, torchrun), end in zip(cases, ends, strict=True):
        try:
            check_end(end, phase, fault, rank=rank, torchrun=torchrun)
            verdict = "as it should"
        except AssertionError as error:
            failed, verdict = failed + 1, "**wrong**"
            print(error, file=sys.stderr)
        codes = " ".join(str(end.ranks[n]) for n in sorted(end.ranks)) or "-"
        message = "<br>".join(end.errors).replace("|", "\\|").replace(str(options.out), "DIR")
        rows.append(
            f"| {phase} | {fault}{', torchrun' * torchrun} | {rank} | {end.seconds:.1f} | {codes} | {end.code} "
            f"| {verdict} | {message} |"
        )
        print(rows[-1], flush=True)
    head = [
        f"`OMP_NUM_THREADS=1 python -m tests.faults --out DIR --jobs {options.jobs}`: torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}.",
        "",
        f"A fault on one rank of four (dp_shard 2 x tp 2): an error of its own, SIGSTOP, SIGKILL, or a call "
        "that does not return. "
        f"Limits in seconds: {', '.join(f'{key} {seconds}' for key, seconds in LIMITS.items())}. Seconds are from the "
        "fault to the end of all other ranks.",
        "",
        f"{len(rows) - failed} of {len(rows)} ended as they should: in time, with one message that names the phase and "
        "the rank, and with its exit code on every rank.",
        "",
        "| phase | fault | rank | s | exit codes of the ranks | of the launcher | | message |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if options.log:
        options.log.write_text("\n".join([*head, *rows, ""]))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
