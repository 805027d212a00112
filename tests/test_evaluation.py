"""The held-out loss of a run: equal to that of plain transformers on every mesh, and no disturbance of the training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ndtrain.recipe import load_recipe
from tests import proofs, tiny
from tests.ranks import get_pool
from tests.test_train import ranks_of, world  # noqa: F401
from tests.test_train import model_dir as saved_model

MESHES: dict[str, dict[str, int]] = {
    "1": {},
    "dp_shard2": {"dp_shard": 2},
    "tp2": {"dp_shard": 1, "tp": 2},
    "cp2": {"dp_shard": 1, "cp": 2},
    "ep2": {"dp_shard": 2, "ep": 2},
    "dp_shard2-tp2": {"dp_shard": 2, "tp": 2},
    "dp_replicate2-dp_shard2": {"dp_replicate": 2, "dp_shard": 2},
}


def held_out_files(folder: Path) -> Path:
    """Real text of ragged lengths that is not in `tiny.write_corpus`."""
    import textwrap as source

    folder.mkdir(parents=True, exist_ok=True)
    text = Path(source.__file__).read_text(encoding="utf-8")
    for i, (start, end) in enumerate(((9000, 9100), (9100, 9131), (9131, 9900))):
        (folder / f"{i}.txt").write_text(text[start:end], encoding="utf-8")
    return folder


def recipe_for(
    world: dict[str, Any],  # noqa: F811
    folder: Path,
    kind: str,
    mesh: str,
    *,
    held_out: dict[str, Any] | None,
    steps: int = 2,
    **more: Any,
) -> Path:
    folder.mkdir(exist_ok=True)
    sizes = MESHES[mesh]
    own = {"eval": {"path": str(held_out_files(world["root"] / "held-out")), **held_out}} if held_out is not None else {}
    return tiny.recipe_file(
        folder / "recipe.toml",
        model={"name": str(saved_model(world, kind)), **more.pop("model", {})},
        corpus=world["corpus"],
        run_dir=folder / "run",
        mesh=sizes,
        steps=steps,
        batch_ranks=sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1),
        **{"checkpoint": {"resume": "auto"}, **more},
        **own,
    )


def trained(path: str, overrides: list[str], stop_at: int | None = None) -> dict[str, Any]:
    """Train to the end, or to a kill after `stop_at` steps; return what was said and where the run ended."""
    import torch.distributed as dist

    from tests.trainers import Said, trainer_of

    said = Said()
    trainer = trainer_of(path, overrides, said=said)
    with proofs.remembered():
        trainer.prepare()
    if stop_at is None:
        trainer.train()
    else:
        while trainer.step < stop_at:
            trainer.train_step()
        trainer.saving.store.settle()
    modes = {module.training for module in trainer.engine.model.modules()}
    dist.barrier()
    return {"said": said.said, "step": trainer.step, "modes": modes}


def run(recipe: Path, *overrides: str, stop_at: int | None = None) -> dict[str, Any]:
    mesh = load_recipe(recipe, overrides).mesh
    ranks = mesh.dp_replicate * max(1, mesh.dp_shard) * mesh.cp * mesh.tp
    return get_pool(ranks).run(trained, str(recipe), list(overrides), stop_at, timeout=300)[0]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def eval_losses(run_dir: Path) -> dict[int, float]:
    found = [line for line in lines(run_dir) if "eval_loss" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: line["eval_loss"] for line in found}


def losses(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines(run_dir) if "loss" in line]


def plain(model_dir: Path, recipe_path: Path, **config: Any) -> tuple[float, int]:
    """Mean loss and targets of a plain evaluation by transformers, one row at a time."""
    recipe = load_recipe(recipe_path)
    assert recipe.eval is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation=recipe.model.attn, **config
    ).eval()
    size, packing = recipe.eval.seq_len, recipe.eval.packing
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, document of each token
    texts = [path.read_bytes() for path in sorted(Path(recipe.eval.path).iterdir())]
    documents = [[256, *text, 257] for text in texts]
    if packing:
        stream = [(token, number) for number, document in enumerate(documents) for token in document]
        rows = [([t for t, _ in part], [n for _, n in part]) for part in _parts(stream, size)]  # type: ignore[misc]
    else:
        rows = [  # type: ignore[misc]
            ([t for t, _ in part], [n for _, n in part])
            for number, document in enumerate(documents)
            for part in _parts([(token, number) for token in document], size)
        ]
    total, count = 0.0, 0
    for ids, numbers in rows[: recipe.eval.rows]:  # type: ignore[misc]
        # Each document of a row by itself: what packing has to give.
        for number in dict.fromkeys(numbers):
            own = [token for token, n in zip(ids, numbers, strict=True) if n == number]
            at = [i for i, n in enumerate(numbers) if n == number]
            inputs = own if at[-1] < size else own[:-1]
            if len(own) < 2:
                continue
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([inputs]), use_cache=False).logits[0].double()
            targets = torch.tensor(own[1:])
            total += float(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
            count += len(targets)
    return total / count, count


def _parts(stream: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """The rows of `size` tokens and the one after, which is a target alone."""
    return [stream[i : i + size + 1] for i in range(0, len(stream) - 1, size)]


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "one rank": ("llama", "1", {}, {}),
    "fully sharded": ("llama", "dp_shard2", {}, {}),
    "tensor parallel, loss parallel": ("llama", "tp2", {}, {}),
    "a head that is not fused with the loss": ("gemma3_capped", "tp2", {}, {}),
    "fewer rows than ranks": ("llama", "dp_shard2-tp2", {"rows": 1}, {}),
    "rows that do not divide": ("qwen3", "dp_shard2", {"rows": 7}, {"train": {"micro_batch_size": 2}}),
    "ulysses": ("qwen3", "cp2", {}, {"cp": {"kind": "ulysses"}}),
    "ring": ("qwen3", "cp2", {}, {"cp": {"kind": "ring"}}),
    "replicas": ("llama", "dp_replicate2-dp_shard2", {}, {}),
    "experts": ("qwen3_moe", "ep2", {}, {"model": {"config": {"output_router_logits": True}}}),
    "one document a row, shorter": ("qwen3", "dp_shard2-tp2", {"packing": False, "seq_len": 20}, {}),
    "longer rows, recomputed blocks, weights kept gathered": (
        *("llama", "dp_shard2", {"seq_len": 50}),
        {"train": {"activation_checkpointing": "full"}, "fsdp": {"reshard_after_forward": False}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_held_out_loss_is_that_of_plain_transformers(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    case: str,
) -> None:
    kind, mesh, held_out, more = CASES[case]
    recipe = recipe_for(world, tmp_path, kind, mesh, held_out={"at_start": True, **held_out}, steps=3, **more)
    ended = run(recipe)
    first, last = (line for line in lines(tmp_path / "run") if "eval_loss" in line)
    loss, count = plain(saved_model(world, kind), recipe)
    assert first["eval_loss"] == pytest.approx(loss, rel=1e-5) and first["eval_tokens"] == count
    assert first["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert last["step"] == 3 and last["eval_loss"] < first["eval_loss"] and last["eval_tokens"] == count
    assert set(first) == {"step", "eval_loss", "perplexity", "eval_tokens", "time"}
    assert any(line.startswith("step 0/3  eval loss ") for line in ended["said"]) and ended["modes"] == {True}
