"""How fast the command line answers, with its limits: python tests/benchmarks/startup.py

--help and the refusal of a bad recipe are the best of 5 calls, the inspection of Qwen3-8B on 64 ranks of 3.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """\
model.name = "{model}"
data = {{ path = ".", seq_len = 4096, tokenizer = "bytes" }}
optim.lr = 3e-4
train.steps = 1000
run.dir = "run"
"""


def best(arguments: list[str], times: int, *, code: int) -> float:
    """Seconds of the fastest of `times` calls of `python -m ndtrain ARGUMENTS`, all of which must end with `code`."""

    def once() -> float:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ndtrain", *arguments], capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode != code:
            sys.exit(f"ndtrain {arguments[0]} ended with {done.returncode}, expected {code}:\n{done.stderr}")
        return seconds

    return min(once() for _ in range(times))


def qwen3_8b(folder: Path) -> str:
    """Path of a recipe for a model of Qwen3-8B's sizes: its config only, inspecting reads no weights."""
    import transformers

    transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder / "qwen3-8b")
    recipe = folder / "qwen3-8b.toml"
    recipe.write_text(RECIPE.format(model=folder / "qwen3-8b"))
    return str(recipe)


def main() -> None:
    """Print the figures; exit 1 if one is over its limit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bad = folder / "bad.toml"
        bad.write_text("[train]\nstpes = 3\n")
        inspect = ["inspect", qwen3_8b(folder), "--world-size", "64"]
        figures = {
            "`ndtrain --help`": (best(["--help"], 5, code=0), 0.3),
            "`ndtrain run` of a bad recipe": (best(["run", str(bad)], 5, code=2), 1.0),
            "`ndtrain inspect` of Qwen3-8B, 64 ranks": (best(inspect, 3, code=0), 8.0),
        }
    print("| command | seconds | limit | ratio |\n|---|---|---|---|")
    for what, (seconds, limit) in figures.items():
        print(f"| {what} | {seconds:.2f} | {limit} | {seconds / limit:.2f} |")
    sys.exit(any(seconds > limit for seconds, limit in figures.values()))


if __name__ == "__main__":
    main()
