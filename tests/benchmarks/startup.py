"""How fast the command line answers, best of 5, with its limits: python tests/benchmarks/startup.py"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path


def best(arguments: list[str], times: int = 5) -> float:
    """Seconds of the fastest of `times` calls of `python -m ndtrain ARGUMENTS`."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ndtrain", *arguments], capture_output=True)
        return time.perf_counter() - start

    return min(once() for _ in range(times))


def main() -> None:
    """Print the figures; exit 1 if one is over its limit."""
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad.toml"
        bad.write_text("[train]\nstpes = 3\n")
        figures = {"--help": (best(["--help"]), 0.3), "run of a bad recipe": (best(["run", str(bad)]), 1.0)}
    for name, (seconds, limit) in figures.items():
        print(f"ndtrain {name}: {seconds:.3f} s (limit {limit} s)")
    sys.exit(any(seconds > limit for seconds, limit in figures.values()))


if __name__ == "__main__":
    main()
