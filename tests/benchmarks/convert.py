"""Time and memory of `ndtrain convert`: against a copy of the same bytes, and against what others have for it.

    OMP_NUM_THREADS=1 python tests/benchmarks/convert.py [--moe] [--layers N] [--rounds N]

Every case runs in a process of its own, forked after all imports, and ends when all is on the disk. A figure is
the best of the rounds, in which the cases take turns; memory is the growth of VmHWM, the worst of the rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
import transformers  # noqa: E402
from accelerate.utils import merge_fsdp_weights  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402
from transformers.distributed import consolidate_distributed_checkpoint  # noqa: E402

from ndtrain.convert import convert  # noqa: E402
from tests.benchmarks.load_memory import status  # noqa: E402
from tests.convert_cases import save_checkpoint  # noqa: E402


def build(layers: int, *, moe: bool) -> transformers.PreTrainedModel:
    """A Llama of about 1.5 GB in float32 at 10 layers, or a Qwen3-MoE of about 1.4 GB."""
    common = {"vocab_size": 32000, "num_hidden_layers": layers, "num_attention_heads": 12, "num_key_value_heads": 12}
    if moe:
        experts = {"hidden_size": 768, "num_experts": 32, "moe_intermediate_size": 384}
        config = transformers.Qwen3MoeConfig(**common, **experts, head_dim=64, tie_word_embeddings=False)
    else:
        config = transformers.LlamaConfig(
            **common, hidden_size=1536, intermediate_size=4096, tie_word_embeddings=False, dtype=torch.float32
        )
    return transformers.AutoModelForCausalLM.from_config(config)


def through_torch(source: Path, config: Path, out: Path) -> None:
    """What the manuals say: one torch file of all, a model that loads it, `save_pretrained`."""
    out.mkdir()
    whole = out / "whole.pt"
    dcp_to_torch_save(source, whole)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(config))
    model.load_state_dict(torch.load(whole, weights_only=True)["model"])
    model.save_pretrained(out)
    whole.unlink()


def copy(source: Path, out: Path) -> None:
    out.mkdir()
    subprocess.run(["cp", *map(str, sorted(source.glob("*.safetensors"))), str(out)], check=True)


def synced(out: Path) -> None:
    for path in [*out.rglob("*"), out]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measured(case: Callable[[Path], object], out: Path, row: Path) -> dict[str, float]:
    """Seconds, CPU seconds and growth of memory of `case(out)` in a forked process."""
    pid = os.fork()
    if not pid:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            before, begin, cpu = status()["VmRSS"], time.perf_counter(), os.times()
            case(out)
            synced(out)
            seconds, after = time.perf_counter() - begin, os.times()
            spent = sum(after[:4]) - sum(cpu[:4])
            row.write_text(json.dumps({"seconds": seconds, "cpu": spent, "memory": status()["VmHWM"] - before}))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(pid, 0)
    found: dict[str, float] = json.loads(row.read_text())
    row.unlink()
    shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--moe", action="store_true", help="Fused experts, which only ndtrain takes apart again.")
    parser.add_argument("--ours", action="store_true", help="Leave out what others have.")
    parser.add_argument("--dir", type=Path, help="Where to write; by default the directory for temporary files.")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        root = Path(folder)
        step, other, out = root / "step", root / "dcp", root / "out"
        model = build(options.layers, moe=options.moe)
        save_checkpoint(model, step, only_rows=True)  # as FSDP cuts
        dcp.save({"model": dict(model.state_dict())}, checkpoint_id=other, no_dist=True)
        largest = max(p.numel() * 4 for n, p in model.named_parameters() if ".experts." in n or not options.moe)
        total = sum(p.numel() * 4 for p in model.parameters())
        del model
        synced(root)
        cases: dict[str, Callable[[Path], object]] = {
            "`cp` of the same bytes": lambda out: copy(step / "model", out),
            "`ndtrain convert`": lambda out: convert(step, out),
            "`ndtrain convert --verify`": lambda out: convert(step, out, verify=True),
            "`ndtrain convert --dtype bfloat16`": lambda out: convert(step, out, dtype="bfloat16"),
            "`ndtrain convert`, DCP of another tool": lambda out: convert(other, out, config=step),
            "`accelerate merge-weights`": lambda out: merge_fsdp_weights(str(other), str(out)),
            "transformers' consolidation": lambda out: consolidate_distributed_checkpoint(step / "model", out),
            "`dcp_to_torch_save`, `save_pretrained`": lambda out: through_torch(other, step, out),
        }
        if options.ours:
            cases = {name: case for name, case in cases.items() if "cp` of" in name or "ndtrain" in name}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(options.rounds):
            for name, case in cases.items():
                rows[name].append(measured(case, out, root / "row.json"))
    print(f"{total / 1e6:,.0f} MB in float32, largest tensor group {largest / 1e6:,.0f} MB, all files synced.\n")
    print("| case | seconds | of `cp` | CPU seconds | memory, MB |\n|---|---|---|---|---|")
    copied = [row["seconds"] for row in rows["`cp` of the same bytes"]]
    for name, seen in rows.items():
        ratio = statistics.median(row["seconds"] / base for row, base in zip(seen, copied, strict=True))
        best, cpu = (min(row[key] for row in seen) for key in ("seconds", "cpu"))
        memory = max(row["memory"] for row in seen)
        print(f"| {name} | {best:.2f} | {ratio:.2f} | {cpu:.2f} | {memory / 1e6:,.0f} |")


if __name__ == "__main__":
    main()
