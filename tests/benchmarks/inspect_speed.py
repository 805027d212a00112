"""Seconds and memory of `ndtrain inspect` of large models, each in a process of its own.

OMP_NUM_THREADS=1 python tests/benchmarks/inspect_speed.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.tiny import recipe_text  # noqa: E402

LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192}
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "Llama-3-8B": (
        "llama",
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "Llama-3-70B": (
        "llama",
        {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
    "Llama-3.1-405B": (
        "llama",
        {
            **LLAMA,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
        },
    ),
    "DeepSeek-V3": ("deepseek_v3", {}),  # the config's own defaults
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
}
# name, model, mesh, options, limit in seconds, limit in MB
CASES: list[tuple[str, str, dict[str, int], list[str], float, float | None]] = [
    ("plan, 16,384 ranks", "Llama-3.1-405B", {"tp": 8}, ["--world-size", "16384"], 5, 1000),
    ("plan, 16,384 ranks", "DeepSeek-V3", {"ep": 64}, ["--world-size", "16384"], 5, 1000),
    ("plan, 16,384 ranks", "Qwen3-235B-A22B", {"tp": 4, "ep": 64}, ["--world-size", "16384"], 5, 1000),
    ("dry step, tp 8 x dp_shard 8", "Llama-3-8B", {"tp": 8, "dp_shard": 8}, ["--dry-run"], 30, None),
    ("suggest", "Llama-3-70B", {}, ["--suggest", "--world-size", "64", "--device", "h100"], 60, None),
]


def measured(command: list[str]) -> tuple[str, float, float]:
    """(seconds, or how it failed; seconds; peak MB) of a process."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    took = time.perf_counter() - started
    failed = f" (exit code {process.returncode})" if process.returncode else ""
    return f"{took:.1f}{failed}", took, used.ru_maxrss / 1024


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("| | model | seconds | limit | over the imports | memory, MB | limit |\n|---|---|---|---|---|---|---|")
    # What every command needs before it has a model: torch and transformers' models.
    imports = ["-c", "from transformers import PreTrainedModel"]
    measured(imports)
    shown, floor, used_mb = measured(imports)
    print(f"| importing torch and transformers | | {shown} | | 1.00 | {used_mb:.0f} | |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for what, name, mesh, options, seconds, memory in CASES:
            kind, config = SHAPES[name]
            recipe = Path(folder) / "recipe.toml"
            recipe.write_text(
                recipe_text(
                    model={"type": kind, "config": config},
                    mesh=mesh,
                    data={"path": "text", "seq_len": 8192, "packing": False, "tokenizer": "bytes"},
                    optim={"lr": 1e-4},
                    train={"steps": 10, "global_batch_size": 64, "micro_batch_size": 1},
                    run={"dir": "run"},
                )
            )
            shown, took, used_mb = measured(["-m", "ndtrain", "inspect", str(recipe), *options])
            ratio = f"{took / floor:.2f}"
            row = [what, name, shown, f"{seconds:g}", ratio, f"{used_mb:.0f}", str(memory or "")]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
