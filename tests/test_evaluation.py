"""The held-out loss of a run: equal to that of plain transformers on every mesh, and no disturbance of the training."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ndtrain.checkpoint import CheckpointStore, check
from ndtrain.recipe import load_recipe
from ndtrain.runs.lock import RunLock
from tests import proofs, tiny
from tests.ranks import RanksFailed, get_pool
from tests.test_tokenizer import bytes_on_disk
from tests.test_train import model_dir as saved_model
from tests.test_train import world  # noqa: F401

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
    steps: int = 3,
    **more: Any,
) -> Path:
    folder.mkdir(exist_ok=True)
    sizes = MESHES[mesh]
    own = (
        {"eval": {"path": str(held_out_files(world["root"] / "held-out")), **held_out}} if held_out is not None else {}
    )
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


class Killed(Exception):
    """Ends a run between two steps."""


def trained(path: str, overrides: list[str], stop_at: int | None = None) -> dict[str, Any]:
    """Train to the end, or to a kill after `stop_at` steps; return what was said and where the run ended."""
    import torch.distributed as dist

    from tests.trainers import Said, trainer_of

    said = Said()
    trainer = trainer_of(path, overrides, said=said)
    with proofs.remembered():
        trainer.prepare()
    step = trainer.advance

    def advance() -> Any:
        if trainer.step == stop_at:
            raise Killed
        return step()

    trainer.advance = advance  # type: ignore[method-assign]
    with suppress(Killed):
        trainer.train()
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
        model_dir, dtype=torch.float32, attn_implementation=tiny.plain_attention(recipe), **config
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


DROPOUT = {"config": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}}


def test_evaluations_leave_the_runs_own_losses_as_they_are_to_the_bit(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    runs = {}
    for name, held_out in (("without", None), ("with", {"at_start": True, "every": 1})):
        recipe = recipe_for(
            world, tmp_path / name, "gpt2", "dp_shard2", held_out=held_out, steps=4, accumulation=2, model=DROPOUT
        )
        run(recipe)
        runs[name] = losses(tmp_path / name / "run")
    assert len(runs["with"]) == 4 and runs["with"] == runs["without"]
    # Nor has dropout part in them.
    first = eval_losses(tmp_path / "with" / "run")[0]
    assert first == pytest.approx(plain(saved_model(world, "gpt2"), tmp_path / "with" / "recipe.toml")[0], rel=1e-5)


def after_an_evaluation(path: str) -> tuple[bool, int]:
    """Whether every unit is sharded after an evaluation, and how many forwards FSDP still expects a backward of."""
    from ndtrain.torch_compat import _fsdp_states, _param_groups
    from tests.trainers import trainer_of

    trainer = trainer_of(path)
    with proofs.remembered():
        trainer.prepare()
    trainer.train_step()
    assert trainer.evaluation is not None and trainer.evaluation.step == 1
    states = _fsdp_states(trainer.engine.model)
    groups = [group for state in states for group in _param_groups(state)]
    pending = sum(len(group._post_forward_indices) for group in groups) + len(states[0]._comm_ctx.post_forward_order)
    trainer.saving.store.settle()
    return all(group.is_sharded for group in groups), pending


def test_an_evaluation_leaves_no_weight_gathered_and_no_backward_pending(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    kept = {"fsdp": {"reshard_after_forward": False}}
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", held_out={"every": 1}, steps=3, **kept)
    assert get_pool(2).run(after_an_evaluation, str(recipe), timeout=200) == [(True, 0)] * 2


# ---- over resumes


def test_after_a_resume_no_evaluation_is_lost_or_made_twice(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    every = {"held_out": {"every": 2}, "steps": 5, "checkpoint": {"resume": "auto", "every": 2}}
    run(recipe_for(world, tmp_path / "whole", "llama", "dp_shard2", **every))
    cut = recipe_for(world, tmp_path / "cut", "llama", "dp_shard2", **every)
    run(cut, stop_at=2)  # killed right after the save
    assert list(eval_losses(tmp_path / "cut/run")) == [2]
    run(cut)
    assert list(eval_losses(tmp_path / "cut/run")) == [2, 4, 5]
    assert eval_losses(tmp_path / "cut/run") == eval_losses(tmp_path / "whole/run")
    assert losses(tmp_path / "cut/run") == losses(tmp_path / "whole/run")


def test_a_run_says_when_it_is_evaluated_on_what_it_trains_on(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "1", held_out={"rows": 2})
    line = "note: [eval] reads what is trained on"
    own = run(recipe, f"eval.path={world['corpus']}", "train.steps=1", "schedule.warmup_steps=0")["said"]
    assert any(said.startswith(line) for said in own)
    other = run(recipe, f"run.dir={tmp_path}/other", "train.steps=1", "schedule.warmup_steps=0")["said"]
    assert not any(said.startswith(line) for said in other)
    held_out = json.dumps(str(world["root"] / "held-out"))
    text = recipe.read_text()
    assert f"path = {held_out}\n" in text
    sources = f'sources = [{{ path = {held_out} }}, {{ path = "{world["corpus"]}" }}]\n'
    recipe.write_text(text.replace(f"path = {held_out}\n", sources))
    one = run(recipe, f"run.dir={tmp_path}/one", "train.steps=1", "schedule.warmup_steps=0")["said"]
    assert any(said.startswith(f"{line} ({world['corpus']})") for said in one)


def stopped_while_evaluating(path: str, at_step: int) -> str:
    """Run until a stop is requested of rank 1 in the middle of the evaluation of a step; return how it ended."""
    import signal

    import torch.distributed as dist

    from ndtrain.engine import Engine
    from ndtrain.errors import Stopped
    from tests.trainers import Said, trainer_of

    said = Said()
    trainer = trainer_of(path, said=said)
    with proofs.remembered():
        trainer.prepare()
    right = Engine.loss_sum

    def asked(engine: Engine, batch: Any) -> torch.Tensor:
        if dist.get_rank() == 1 and trainer.step == at_step:
            trainer.stop_signals.signal = signal.SIGTERM
        return right(engine, batch)

    with pytest.MonkeyPatch.context() as patches, pytest.raises(Stopped) as stopped:
        patches.setattr(Engine, "loss_sum", asked)
        trainer.train()
    assert any(f"step {at_step} is not evaluated, since a stop was requested" in line for line in said.said)
    return str(stopped.value)


def test_a_stop_cuts_an_evaluation_short_which_the_next_start_makes_first(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", held_out={"every": 1, "at_start": True}, steps=4)
    for end in get_pool(2).run(stopped_while_evaluating, str(recipe), 0, timeout=200):
        assert "before the first step, so there is nothing to save" in end
    assert not (tmp_path / "run/metrics.jsonl").exists()
    for end in get_pool(2).run(stopped_while_evaluating, str(recipe), 2, timeout=200):
        assert "after step 2 of 4, which is saved" in end
    assert list(eval_losses(tmp_path / "run")) == [0, 1]
    ended = run(recipe)
    assert list(eval_losses(tmp_path / "run")) == [0, 1, 2, 3, 4]
    said = ended["said"]
    resumed = next(i for i, line in enumerate(said) if line.startswith("resumed from"))
    assert said[resumed + 1].startswith("step 2/4  eval loss")


def test_losses_of_other_rows_count_no_more_after_a_resume(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    patient = {"every": 1, "patience": 9}
    recipe = recipe_for(world, tmp_path, "llama", "1", held_out=patient, steps=4, checkpoint={"resume": "auto"})
    run(recipe, "train.steps=3")
    same = run(recipe, stop_at=3)
    assert not any("[eval]" in line for line in same["said"])
    other = run(recipe, "eval.rows=3")
    assert any("the rows of [eval] are not those of the checkpoint" in line for line in other["said"])
    # The change of a key of [eval] is told and free; the model is evaluated on the new rows before the next step.
    assert any(line.split()[:1] == ["eval.rows"] for text in other["said"] for line in text.splitlines())
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line] == [1, 2, 3, 3, 4]


def test_a_new_section_is_one_line_of_what_a_resume_compares(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    run(recipe_for(world, tmp_path, "llama", "1", held_out=None, steps=3))
    ended = run(recipe_for(world, tmp_path, "llama", "1", held_out={"every": 3}, steps=4))
    (table,) = [text for text in ended["said"] if "differs from this run" in text]
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["eval.path"] + [
        key for key in ("schedule.warmup_steps", "train.steps") if key in table
    ]
    assert list(eval_losses(tmp_path / "run")) == [3, 4]


# ---- patience and the best checkpoint


def scripted(path: str, overrides: list[str], script: dict[int, float], stop_at: int | None = None) -> dict[str, Any]:
    """`trained` with the held-out losses of `script`, by step."""
    from ndtrain.train.evaluation import Evaluation

    right = Evaluation.measure

    def measure(self: Evaluation, step: int, *, goes_on: Any) -> Any:
        from dataclasses import replace

        found = right(self, step, goes_on=goes_on)
        return replace(found, eval_loss=script[step])

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Evaluation, "measure", measure)
        return trained(path, overrides, stop_at)


def run_scripted(recipe: Path, script: dict[int, float], *overrides: str, stop_at: int | None = None) -> dict[str, Any]:
    return get_pool(2).run(scripted, str(recipe), list(overrides), script, stop_at, timeout=300)[0]


def kept(run_dir: Path) -> tuple[list[int], str]:
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir())
    best = run_dir / "best"
    return steps, best.read_text() if best.exists() else ""


def test_patience_ends_the_run_with_its_step_saved_also_over_a_resume(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    script = {0: 1.0, 1: 5.0, 2: 4.0, 3: 4.5, 4: math.nan, 5: 4.0, 6: 3.0, 7: 2.0}
    recipe = recipe_for(
        world,
        tmp_path,
        "llama",
        "dp_shard2",
        held_out={"every": 1, "patience": 3, "at_start": True},
        steps=7,
        checkpoint={"resume": "auto", "every": 4, "keep": 9},
    )
    run_scripted(recipe, script, stop_at=4)
    ended = run_scripted(recipe, script)
    assert ended["step"] == 5 and kept(tmp_path / "run") == ([4, 5], "")
    why = "no eval loss below 4.0000 in 3 evaluations in a row; the run ends at step 5"
    assert any(why in line for line in ended["said"])
    found = eval_losses(tmp_path / "run")
    assert list(found) == [0, 1, 2, 3, 4, 5] and found[4] is None
    again = run_scripted(recipe, script)
    assert again["step"] == 5
    assert any("nothing to do: eval.patience = 3 ended the run at step 5 of 7" in line for line in again["said"])
    more = run_scripted(recipe, script, "eval.patience=4")
    assert more["step"] == 7


def test_the_best_checkpoint_is_kept_beside_the_newest_and_named(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    script = {0: 1.0, 1: 5.0, 2: 3.0, 3: 3.0, 4: 4.0, 5: math.inf, 6: 2.0, 7: 2.5, 8: 2.5}
    recipe = recipe_for(
        world,
        tmp_path,
        "llama",
        "dp_shard2",
        held_out={"every": 1, "at_start": True},
        steps=8,
        checkpoint={"resume": "auto", "every": 4, "keep": 1, "keep_best": True},
    )
    directory = tmp_path / "run"
    run_scripted(recipe, script, stop_at=3)
    assert kept(directory) == ([2], "checkpoints/step-00000002\n")  # a new lowest loss is saved at once
    ended = run_scripted(recipe, script, stop_at=5)
    assert any("resumed from" in line and "(step 2," in line for line in ended["said"])
    assert kept(directory) == ([2, 4], "checkpoints/step-00000002\n")
    # A process that died before it wrote the file, and files that name what is not there.
    (directory / "best").write_text("checkpoints/step-00000004\n")
    run_scripted(recipe, script, stop_at=5)
    assert kept(directory) == ([2, 4], "checkpoints/step-00000002\n")
    run_scripted(recipe, script)
    assert kept(directory) == ([6, 8], "checkpoints/step-00000006\n")


def failing_at(path: str, script: dict[int, float], failing: int) -> None:
    """`scripted`, where the checkpoint of a step cannot be written."""
    import ndtrain.checkpoint.tensors as module

    real = module._write_file

    def full(file: Path, entries: Any) -> Any:
        if file.parent.parent.name == f".tmp-step-{failing:08d}":
            raise OSError(28, "No space left on device", str(file))
        return real(file, entries)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(module, "_write_file", full)
        scripted(path, [], script)


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_that_was_not_written_is_not_the_best(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    background: bool,
) -> None:
    recipe = recipe_for(
        world,
        tmp_path,
        "llama",
        "dp_shard2",
        held_out={"every": 1},
        steps=5,
        checkpoint={"every": 0, "keep": 1, "keep_best": True, "async": background},
    )
    get_pool(2).run(failing_at, str(recipe), {1: 5.0, 2: 2.0, 3: 4.0, 4: 4.5, 5: 4.5}, 2, timeout=200)
    assert kept(tmp_path / "run") == ([3, 5], "checkpoints/step-00000003\n")


def killed_while_saving(run_dir: Path, step: int, calls: int) -> bool:
    """Save a step as the best in a process that dies before its `calls`-th change of a file; whether it died."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    left = calls

    def dying(work: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)
            return work(*args, **kwargs)

        return called

    for owner, names in ((Path, ("rename", "replace", "write_text", "write_bytes")), (os, ("unlink", "rmdir"))):
        for name in names:
            setattr(owner, name, dying(getattr(owner, name)))
    save(CheckpointStore(run_dir, keep=1), step, best_step=step)
    os._exit(0)


def save(store: CheckpointStore, step: int, *, best_step: int) -> None:
    store.save(step, model={"w": torch.full((4,), float(step))}, optim={}, state={"step": step}, best_step=best_step)


def test_whenever_a_save_is_killed_best_names_a_whole_checkpoint(tmp_path: Path) -> None:
    calls, ends = 0, []
    while not ends or ends[-1] is not None:
        calls += 1
        run_dir = tmp_path / str(calls)
        store = CheckpointStore(run_dir, keep=1)
        save(store, 1, best_step=1)
        save(store, 2, best_step=1)
        assert kept(run_dir) == ([1, 2], "checkpoints/step-00000001\n")
        died = killed_while_saving(run_dir, 3, calls)
        named = (run_dir / "best").read_text().strip()
        check(run_dir / named)
        newest, refused = store.newest_valid()
        assert newest is not None and not refused
        ends.append((newest.name, named) if died else None)
        # A resume from the newest names the best that it knows, and the next save removes the rest.
        best_step = 3 if newest.name == "step-00000003" else 1
        assert store.name_best(best_step)
        store.prune(int(newest.name.removeprefix("step-")))
        assert kept(run_dir) == ([3] if best_step == 3 else [1, 2], f"checkpoints/step-{best_step:08d}\n")
    new, old = "step-00000003", "checkpoints/step-00000001"
    assert {("step-00000002", old), (new, old), (new, f"checkpoints/{new}")} == set(ends) - {None}


# ---- evaluations alone


def ndtrain(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ndtrain", *args], capture_output=True, text=True, env=env, timeout=300
    )


def files_of(run_dir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def evaluated_only(path: str, overrides: list[str]) -> list[str]:
    """Evaluate what a run would begin with; return what was said."""
    from ndtrain.train.evaluation import evaluate_only
    from tests.trainers import Said, trainer_of

    said = Said()
    trainer = trainer_of(path, overrides, said=said)
    with proofs.remembered():
        evaluate_only(trainer.engine, runtime=trainer.runtime, reporter=said)
    return said.said


def test_eval_only_evaluates_the_model_where_there_is_no_checkpoint(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "1", held_out={})
    done = ndtrain("run", str(recipe), "--eval-only")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    want, count = plain(saved_model(world, "llama"), recipe)
    assert f"step 0/3  eval loss {want:.4f}  perplexity {math.exp(want):.4g}  ({count} tokens)" in done.stdout
    assert eval_losses(tmp_path / "run")[0] == pytest.approx(want, rel=1e-5)
    assert set(files_of(tmp_path / "run")) == {"metrics.jsonl", "proof.json"}


def test_eval_only_evaluates_the_newest_checkpoint_on_another_mesh_and_saves_nothing(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", held_out={})
    run(recipe)
    before = files_of(tmp_path / "run")
    # Nothing of the training need be as it was, nor its data be there.
    changed = ["mesh.dp_shard=1", "mesh.tp=2", "optim.lr=1.0", "data.path=/no/such/file", "train.seed=9"]
    said = get_pool(2).run(evaluated_only, str(recipe), changed, timeout=200)[0]
    assert any(line.startswith("step 3/3  eval loss") for line in said)
    *_, of_run, alone = lines(tmp_path / "run")
    assert (alone["step"], alone["eval_tokens"]) == (3, of_run["eval_tokens"])
    assert alone["eval_loss"] == pytest.approx(of_run["eval_loss"], rel=1e-5)
    after, changing = files_of(tmp_path / "run"), {"metrics.jsonl", "proof.json"}
    assert after.keys() == before.keys()
    assert all(after[name] == content for name, content in before.items() if name not in changing)

    # Only what its loss depends on has to be that of the checkpoint.
    for override, words in (
        ("model.config.rms_norm_eps=1.0", r"model\.config\.rms_norm_eps was 1e-06, is now 1\.0"),
        (
            f"data.tokenizer={bytes_on_disk(tmp_path / 'tokenizer')}",
            r"data\.tokenizer was bytes, is now .*other tokens",
        ),
    ):
        with pytest.raises(RanksFailed, match=f"RecipeError: .*{words}"):
            get_pool(2).run(evaluated_only, str(recipe), [override], timeout=200)


def test_held_out_text_is_encoded_as_its_own_keys_say(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    text = "<|im_start|>user\nhello"
    (tmp_path / "rendered.txt").write_text(text, encoding="utf-8")
    data = {"tokenizer": str(bytes_on_disk(tmp_path / "tokenizer"))}
    held_out = {"path": str(tmp_path / "rendered.txt"), "special_tokens": "parse"}
    recipe = recipe_for(world, tmp_path, "llama", "1", held_out=held_out, data=data)
    for overrides in ([], ["eval.special_tokens=text"]):
        get_pool(1).run(evaluated_only, str(recipe), overrides, timeout=200)
    parsed, plainly = (line["eval_tokens"] for line in lines(tmp_path / "run"))
    assert plainly - parsed == len("<|im_start|>") - 1


def test_eval_only_needs_held_out_data_and_a_run_directory_that_no_run_uses(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "1", held_out={}, steps=3)
    (tmp_path / "run").mkdir()
    owner = RunLock(tmp_path / "run", launch="")
    owner.take()
    used = ndtrain("run", str(recipe), "--eval-only")
    owner.release()
    assert used.returncode == 2 and f"is in use by process {os.getpid()} on " in used.stderr
    assert not list((tmp_path / "run").iterdir())
    without = recipe_for(world, tmp_path, "llama", "1", held_out=None, steps=3)
    refused = ndtrain("run", str(without), "--eval-only")
    assert refused.returncode == 2 and "--eval-only needs held-out data: give its path in [eval]" in refused.stderr


# ---- what is refused


def prepared(path: str, overrides: list[str]) -> None:
    from tests.trainers import trainer_of

    trainer_of(path, overrides).prepare()


def test_a_model_that_changes_its_weights_in_eval_mode_is_refused(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = {**tiny.MATRIX["rwkv"], "num_hidden_layers": 3, "rescale_every": 2}
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "rwkv", "attn": "eager", "config": config},
        corpus=world["corpus"],
        run_dir=tmp_path / "run",
        steps=3,
        data={"packing": False},
        eval={"path": str(held_out_files(world["root"] / "held-out"))},
    )
    with pytest.raises(RanksFailed, match=r"PlanError: rwkv changes its weights in eval mode, which a run must not"):
        get_pool(1).run(prepared, str(recipe), [], timeout=200)


def prepared_with_another_eval_mode(path: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    right = LlamaMLP.forward

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return right(self, x) if self.training else 1.1 * right(self, x)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(LlamaMLP, "forward", forward)
        prepared(path, [])


def test_a_model_that_computes_something_else_in_eval_mode_is_refused(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "1", held_out={})
    with pytest.raises(RanksFailed, match="PlanError: llama computes something else in eval mode than in training"):
        get_pool(1).run(prepared_with_another_eval_mode, str(recipe), timeout=200)


@pytest.mark.parametrize(
    ("kind", "held_out", "words"),
    [
        ("llama", {"path": "/no/such/file"}, r'RecipeError: eval\.path = "/no/such/file" matches no file'),
        ("gpt2", {"seq_len": 129}, r"PlanError: eval\.seq_len = 129 exceeds the 128 learned positions of gpt2"),
        ("llama_dynamic", {"seq_len": 40}, r"PlanError: llama: its dynamic position embedding uses the frequencies of"),
    ],
)
def test_held_out_data_that_cannot_be_used_is_refused_by_the_name_of_its_key(
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    kind: str,
    held_out: dict[str, Any],
    words: str,
) -> None:
    recipe = recipe_for(world, tmp_path, kind, "1", held_out=held_out)
    with pytest.raises(RanksFailed, match=words):
        get_pool(1).run(prepared, str(recipe), [], timeout=200)
