"""Ten kills of a run, half of them while a checkpoint is written; `python -m tests.chaos` does 200."""

import random
from pathlib import Path

from tests.chaos.run import check_end, disturbed, undisturbed


def test_a_run_killed_ten_times_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    expected, whole_s = undisturbed(tmp_path, 2)
    moments, kills, runs = random.Random(5), [], 0
    while len(kills) < 10:
        runs += 1
        kills += disturbed(tmp_path, f"run-{runs}", 2, moments, whole_s=whole_s)
        check_end(tmp_path, f"run-{runs}", expected)
    assert sum(kill.writing for kill in kills) >= 3
