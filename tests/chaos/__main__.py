"""Kill a run of four ranks at random moments, again and again, and see that it ends as if nothing had been.

OMP_NUM_THREADS=1 python -m tests.chaos --out DIR [--kills 200] [--seed 1] [--log tests/chaos/LOG.md]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch

from tests.chaos.run import EVERY, KEEP, STEPS, check_end, disturbed, undisturbed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    moments, lines, kills, runs = random.Random(options.seed), [], 0, 0
    started = time.monotonic()
    expected, whole_s = undisturbed(options.out, options.ranks)
    writing = 0
    while kills < options.kills:
        runs += 1
        for kill in disturbed(options.out, f"run-{runs}", options.ranks, moments, whole_s=whole_s):
            kills += 1
            writing += kill.writing
            who = "all ranks" if len(kill.ranks) > 1 else f"rank {kill.ranks[0]}"
            what = "while a checkpoint is written" if kill.writing else ""
            lines.append(f"| {kills} | {runs} | {kill.after_s:.2f} | {who} | {what} | {kill.resumed_from} |")
            print(lines[-1], flush=True)
        check_end(options.out, f"run-{runs}", expected)
    head = [
        f"`OMP_NUM_THREADS=1 python -m tests.chaos --out DIR --kills {options.kills} --ranks {options.ranks} "
        f"--seed {options.seed}`: torch {torch.__version__}, Python {sys.version.split()[0]}, "
        f"{(time.monotonic() - started) / 60:.0f} min.",
        "",
        f"{kills} kills by SIGKILL, {writing} of them while a checkpoint was written, over {runs} runs of {STEPS} "
        f"steps on {options.ranks} ranks, a checkpoint every {EVERY} steps, keep = {KEEP}. Every run ended with the "
        "losses of an undisturbed run, step by step to the bit; no damaged checkpoint was ever under its final name, "
        "none that was whole was lost, and nothing was left beyond `keep`.",
        "",
        "| kill | run | after s | of | | newest whole checkpoint |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(head[2:3]))
    if options.log:
        options.log.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
