"""ndtrain's step against transformers' Trainer on a model cut in the same way: the same model, rows and ranks.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/step_vs_trainer.py [--axis dp_shard | tp | ep]

Segments of both alternate inside one run (ndtrain's run in a callback of the Trainer), so that other load on the
machine meets both alike. A segment's time is the whole of its loop: batch, forward, backward, clipping, optimizer.
The last column compares rank 0's CPU seconds, which other processes disturb less than the clock.
"""

import argparse
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ndtrain.hf.model import meta_model  # noqa: E402
from ndtrain.plan import make_plan  # noqa: E402
from ndtrain.recipe import load_recipe  # noqa: E402
from ndtrain.runs.process import Runtime, start  # noqa: E402
from ndtrain.train import Silent, Trainer, sizes_for  # noqa: E402
from tests.tiny import recipe_text  # noqa: E402

LR, DECAY, CLIP = 3e-4, 0.1, 1.0


# Axis -> what it gives the recipe's [mesh], and transformers' own `DistributedConfig`, on that many ranks.
MESHES: dict[str, Callable[[int], tuple[dict[str, int], dict[str, int]]]] = {
    "dp_shard": lambda ranks: ({"dp_shard": ranks}, {"fsdp_size": ranks}),
    "tp": lambda ranks: ({"dp_shard": 1, "tp": ranks}, {"tp_size": ranks}),
    "ep": lambda ranks: ({"dp_shard": ranks, "ep": ranks}, {"fsdp_size": ranks, "ep_size": ranks}),
}


def save_model(path: Path, options: argparse.Namespace) -> None:
    """A random Qwen3 of the asked size in `path`, with experts for ep."""
    sparse = options.axis == "ep"
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": options.hidden} if sparse else {}
    config = transformers.AutoConfig.for_model(
        "qwen3_moe" if sparse else "qwen3",
        **experts,
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 128),
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=258,
        bos_token_id=256,
        eos_token_id=257,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)


def write_corpus(path: Path) -> None:
    """Sources of Python's standard library, some megabytes of them."""
    path.mkdir()
    for i, file in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        (path / f"{i:03}.txt").write_bytes(file.read_bytes())


def ndtrain_trainer(folder: Path, runtime: Runtime, *, dtype: str, options: argparse.Namespace) -> Trainer:
    """An ndtrain Trainer, prepared."""
    text = recipe_text(
        model={"name": str(folder / "model")},
        mesh=MESHES[options.axis](runtime.world_size)[0],
        fsdp={"param_dtype": dtype},
        data={"path": str(folder / "corpus"), "seq_len": options.seq, "tokenizer": "bytes"},
        optim={"lr": LR, "weight_decay": DECAY, "max_grad_norm": CLIP},
        schedule={"kind": "constant"},
        train={
            "steps": 10**6,
            "global_batch_size": options.batch * batch_ranks(options, runtime),
            "micro_batch_size": options.batch,
            "compile": options.compile,
        },
        checkpoint={"every": 0, "resume": "never"},
        run={"dir": str(folder / f"run-{dtype}")},
    )
    path = folder / f"recipe-{dtype}-{runtime.rank}.toml"
    path.write_text(text)
    recipe = load_recipe(path, [])
    model = meta_model(recipe)
    plan = make_plan(model, sizes_for(recipe, runtime.world_size), recipe)
    trainer = Trainer(recipe, plan, model, runtime=runtime, reporter=Silent())
    trainer.prepare()
    return trainer


def batch_ranks(options: argparse.Namespace, runtime: Runtime) -> int:
    """How many ranks have rows of their own."""
    return 1 if options.axis == "tp" else runtime.world_size


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """ndtrain's rows as the Trainer takes them: it shifts the labels itself."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {name: torch.from_numpy(value) for name, value in self.samples[index].items()}
        return {"input_ids": row["input_ids"], "labels": row["input_ids"], "position_ids": row["position_ids"]}


class Alternate(transformers.TrainerCallback):
    """After every segment of the Trainer's steps runs one of ndtrain's. The first round is warm-up."""

    def __init__(self, ours: Trainer, steps: int) -> None:
        self.ours, self.steps = ours, steps
        self.theirs_s: list[float] = []
        self.ours_s: list[float] = []
        self.theirs_cpu: list[float] = []
        self.ours_cpu: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.since, self.cpu_since = time.perf_counter(), time.process_time()

    def _lap(self, clock: list[float], cpu: list[float]) -> None:
        dist.barrier()
        clock.append(time.perf_counter() - self.since)
        cpu.append(time.process_time() - self.cpu_since)
        self.since, self.cpu_since = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        self._lap(self.theirs_s, self.theirs_cpu)
        for _ in range(self.steps):
            self.ours.advance()
        self._lap(self.ours_s, self.ours_cpu)


def compare(folder: Path, runtime: Runtime, *, dtype: str, options: argparse.Namespace) -> list[float]:
    """Medians over the segments: ndtrain's seconds, the Trainer's, ndtrain's CPU seconds, the Trainer's."""
    from accelerate import ParallelismConfig
    from transformers.distributed import DistributedConfig

    if runtime.device.type == "cpu":  # where accelerate takes no tp; nothing else of it depends on the device
        ParallelismConfig._validate_accelerator = lambda *_: None
    ours = ndtrain_trainer(folder, runtime, dtype=dtype, options=options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=torch.float32,
        attn_implementation="sdpa",
        distributed_config=DistributedConfig(
            **MESHES[options.axis](runtime.world_size)[1], fsdp_mixed_precision=dtype == "bfloat16"
        ),
    )
    theirs.config.use_cache = False
    alternate = Alternate(ours, options.steps)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "hf"),
        max_steps=options.steps * (options.rounds + 1),
        per_device_train_batch_size=options.batch,
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        use_cpu=runtime.device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(
        model=theirs, args=arguments, train_dataset=Rows(ours.batches.samples), callbacks=[alternate]
    ).train()
    if options.profile:
        profile(ours)
    if runtime.is_main:
        print(f"{dtype} segments, s: ndtrain {alternate.ours_s} Trainer {alternate.theirs_s}", file=sys.stderr)
    laps = (alternate.ours_s, alternate.theirs_s, alternate.ours_cpu, alternate.theirs_cpu)
    return [statistics.median(lap[1:]) for lap in laps]


def profile(ours: Trainer) -> None:
    """Where ndtrain's step spends its time, on rank 0's stderr."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            ours.advance()
    if dist.get_rank() == 0:
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 6, "vocab": 8192, "seq": 256, "batch": 4, "steps": 4, "rounds": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--axis", choices=MESHES, default="dp_shard")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="ndtrain with train.compile = true.")
    parser.add_argument("--profile", action="store_true", help="Also print a profile of ndtrain's step.")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with start() as runtime, tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        folder = Path(shared[0])
        os.environ["NDTRAIN_CACHE"] = str(folder / "cache")
        if runtime.is_main:
            save_model(folder / "model", options)
            write_corpus(folder / "corpus")
        dist.barrier()
        found = {d: compare(folder, runtime, dtype=d, options=options) for d in options.dtypes}
        if runtime.is_main:
            tokens = options.steps * options.batch * options.seq * batch_ranks(options, runtime)
            print(f"Median of {options.rounds} alternating segments of {options.steps} steps each:\n")
            print("| compute dtype | ndtrain, tokens/s | Trainer, tokens/s | ndtrain / Trainer | by CPU time |")
            print("|---|---|---|---|---|")
            for dtype, (ours, theirs, ours_cpu, theirs_cpu) in found.items():
                speeds = f"{tokens / ours:.0f} | {tokens / theirs:.0f}"
                print(f"| {dtype} | {speeds} | {theirs / ours:.3f} | {theirs_cpu / ours_cpu:.3f} |")
        dist.barrier()


if __name__ == "__main__":
    main()
