"""Every mesh gives the same training as plain single-process transformers and torch.optim."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from tests import proofs, tiny
from tests.ranks import get_pool

MESHES: dict[str, dict[str, int]] = {
    "1": {},
    "dp_shard2": {"dp_shard": 2},
    "dp_shard4": {"dp_shard": 4},
    "tp2": {"dp_shard": 1, "tp": 2},
    "tp4": {"dp_shard": 1, "tp": 4},
    "dp_shard2-tp2": {"dp_shard": 2, "tp": 2},
    "dp_replicate2-dp_shard2": {"dp_replicate": 2, "dp_shard": 2},
    "dp_replicate2-tp2": {"dp_replicate": 2, "dp_shard": 1, "tp": 2},
}
CP_MESHES: dict[str, dict[str, int]] = {
    "cp2": {"dp_shard": 1, "cp": 2},
    "cp4": {"dp_shard": 1, "cp": 4},
    "dp_shard2-cp2": {"dp_shard": 2, "cp": 2},
    "cp2-tp2": {"dp_shard": 1, "cp": 2, "tp": 2},
    "dp_replicate2-cp2": {"dp_replicate": 2, "dp_shard": 1, "cp": 2},
}
RING: dict[str, Any] = {"cp": {"kind": "ring"}}
KINDS = ["llama", "qwen3", "gemma3_text"]


EP_MESHES: dict[str, dict[str, int]] = {
    "ep2": {"dp_shard": 2, "ep": 2},
    "ep2-efsdp2": {"dp_shard": 4, "ep": 2},
    "dp_replicate2-ep2": {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    "dp_shard2-cp2-ep4": {"dp_shard": 2, "cp": 2, "ep": 4},
    "dp_shard2-tp2-ep4": {"dp_shard": 2, "tp": 2, "ep": 4},
}
ALL_MESHES = MESHES | CP_MESHES | EP_MESHES


def ranks_of(mesh: dict[str, int]) -> int:
    return math.prod(size for axis, size in mesh.items() if axis != "ep")


def trained(path: str, overrides: list[str], stop: int | None = None, *, proves: bool = False) -> dict[str, Any]:
    """One run on the ranks of a pool, killed after `stop` steps: its metrics and the sample ids of every step.

    Where what it trains is not what the recipe says, it `proves`, whatever an earlier case has shown.
    """
    import torch.distributed as dist

    from tests.trainers import trainer_of

    trainer = trainer_of(path, overrides)
    recipe = trainer.recipe
    with nullcontext() if proves else proofs.remembered():
        trainer.prepare()
    first = trainer.cursor
    try:
        while trainer.step < (stop or trainer.steps):
            trainer.train_step()
    finally:
        trainer.saving.store.settle()  # also where a step is refused, as `train` does
    if stop is None:
        trainer.train()  # nothing is left to do but to tidy up
    size = recipe.train.global_batch_size
    ids = [trainer.batches.sample_ids(c).tolist() for c in range(first, trainer.cursor, size)]
    # Rank 0 writes them, and the other ranks may be ahead of it.
    lines = (Path(recipe.run.dir) / "metrics.jsonl").read_text().splitlines() if dist.get_rank() == 0 else []
    return {"metrics": [json.loads(line) for line in lines], "ids": ids}


def reference(
    model_dir: Path,
    recipe_path: Path,
    *,
    without: tuple[int, ...] = (),
    grouped: Callable[[torch.nn.Module], list[dict[str, Any]]] | None = None,
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a plain training loop on the same global batches.

    The steps `without`, counted from 1, change nothing. `grouped` makes the optimizer's groups, each with its "peak".
    """
    from ndtrain import data
    from ndtrain.hf.tokenizer import ByteTokenizer
    from ndtrain.recipe import load_recipe
    from ndtrain.train import cache_root

    recipe = load_recipe(recipe_path)
    corpus = data.build_cache(
        data.find_files(recipe.data.path), data.TextEncoder(ByteTokenizer()), cache_dir=cache_root() / "data"
    )
    samples = data.open_samples(corpus, recipe.data.seq_len, packing=recipe.data.packing, pad_id=258)
    order = data.Order(len(samples), seed=recipe.train.seed, shuffle=True)
    attn = tiny.plain_attention(recipe)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=attn)
    model.train()
    section = recipe.optim
    groups: Any = tiny.decay_groups(model, section.weight_decay)
    if section.decay_norms:
        groups = [{"params": list(model.parameters()), "weight_decay": section.weight_decay}]
    if grouped is not None:
        groups = grouped(model)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=tuple(section.betas), eps=section.eps)
    total = recipe.train.steps
    warm = recipe.schedule.warmup_steps
    low = recipe.schedule.min_lr_ratio
    results = []
    for step in range(total):
        rows = [samples[int(i)] for i in order.sample_ids(step * 8, 8)]
        batch = {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}
        # Rows of one document have the positions that the model gives them.
        positions = {"position_ids": batch["position_ids"]} if recipe.data.packing else {}
        logits = model(input_ids=batch["input_ids"], use_cache=False, **positions).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm) / (total - warm), dtype=torch.float64)))
        share = (step + 1) / warm if step < warm else low + (1 - low) * float(cosine)
        for group in optimizer.param_groups:
            group["lr"] = group.get("peak", recipe.optim.lr) * share
        if step + 1 not in without:
            optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models, corpus and reference results, made once."""
    root = tmp_path_factory.mktemp("world")
    return {"root": root, "corpus": tiny.write_corpus(root / "corpus"), "models": {}, "references": {}}


def model_dir(world: dict[str, Any], kind: str) -> Path:
    if kind not in world["models"]:
        world["models"][kind] = tiny.save_model(kind, world["root"])
    return world["models"][kind]


def expected(world: dict[str, Any], kind: str, recipe: Path) -> list[tuple[float, float]]:
    if kind not in world["references"]:
        world["references"][kind] = reference(model_dir(world, kind), recipe)
    return world["references"][kind]


def recipe_for(world: dict[str, Any], tmp_path: Path, kind: str, mesh: str, **more: Any) -> Path:
    sizes = ALL_MESHES[mesh]
    return tiny.recipe_file(
        tmp_path / "recipe.toml",
        corpus=world["corpus"],
        run_dir=tmp_path / "run",
        mesh=sizes,
        batch_ranks=sizes.get("dp_replicate", 1) * sizes.get("dp_shard", 1),
        **{**more, "model": {"name": str(model_dir(world, kind)), **more.get("model", {})}},
    )


# test_matrix.py has more models; without accumulation (and loaded from rank 0) a tied model is enough.
CASES = [
    (kind, mesh, accumulation)
    for kind in ("llama", "gemma3_text")
    for mesh in MESHES
    for accumulation in (1, 2)
    if accumulation == 2 or (kind == "gemma3_text" and mesh in ("1", "dp_shard4", "dp_shard2-tp2"))
]


@pytest.mark.parametrize(("kind", "mesh", "accumulation"), CASES)
def test_every_mesh_trains_like_plain_transformers(
    world: dict[str, Any], tmp_path: Path, kind: str, mesh: str, accumulation: int
) -> None:
    load = {"mode": "sharded" if accumulation == 2 else "rank0"}
    recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=accumulation, steps=4, load=load)
    result = get_pool(ranks_of(MESHES[mesh])).run(trained, str(recipe), [], timeout=300)[0]
    got = [(m["loss"], m["grad_norm"]) for m in result["metrics"]]
    want = expected(world, kind, recipe)
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4), f"step {step + 1}"


GATHERED = {f"model.layers.*.mlp.{name}_proj": "colwise_gather_output" for name in ("gate", "up", "down")}

# (kind, mesh, what the recipe adds): the paths that the table above and the cells of tests/test_matrix.py do not take.
OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixture of experts": ("qwen3_moe", "dp_shard4", {}),
    "fused projections": ("phi3", "dp_replicate2-dp_shard2", {}),
    "soft-capped logits": ("gemma3_capped", "dp_shard2", {}),
    "recomputed blocks": ("llama", "dp_shard2-tp2", {"train": {"activation_checkpointing": "full"}}),
    "one document a row": ("qwen3", "dp_shard2", {"data": {"packing": False}}),
    "whole documents in a row": ("gemma3_text", "dp_shard2-tp2", {"data": {"packing": "best_fit", "seq_len": 64}}),
    "weights kept gathered": ("qwen3", "dp_shard2", {"fsdp": {"reshard_after_forward": False}}),
    "rows that do not divide": ("llama", "dp_shard4", {"train": {"micro_batch_size": 3}}),
    "whole sequences under tp": ("qwen3", "tp2", {"tp": {"sequence_parallel": False}}),
    "sequences that do not divide under tp": ("llama", "dp_shard2-tp2", {"data": {"seq_len": 31}}),
    "learned activation under tp": ("apertus", "tp2", {"data": {"packing": False}}),
    "styles of the recipe": ("qwen3", "dp_shard2-tp2", {"tp": {"plan": GATHERED}}),
    "buffers that construction makes": ("falcon_h1", "dp_shard2", {"data": {"packing": False}}),
    "sequence parallelism that fails": ("dbrx", "tp2", {"data": {"packing": False}}),
    "latent attention under tp": ("minicpm3", "tp2", {}),
    "experts under tp and ep": ("qwen3_moe", "dp_shard2-tp2-ep4", {}),
    "experts": ("qwen3_moe", "ep2", {}),
    "experts, cut over efsdp": ("qwen3_moe", "ep2-efsdp2", {}),
    "fewer experts than ranks": ("qwen3_moe_few", "ep2-efsdp2", {}),
    "fewer experts than ranks, without ep": ("qwen3_moe_few", "dp_shard4", {"load": {"mode": "sharded"}}),
    "experts, replicas": ("qwen3_moe", "dp_replicate2-ep2", {}),
    "experts under ulysses": ("qwen3_moe", "dp_shard2-cp2-ep4", {}),
    "experts without tokens": ("gpt_oss_biased", "ep2", {"model": {"attn": "eager"}, "data": {"packing": False}}),
    "ulysses": ("llama", "cp2", {"cp": {"kind": "ulysses"}}),
    "betas and eps": ("llama", "dp_shard2", {"optim": {"betas": [0.7, 0.8], "eps": 1e-3}}),
    "decay of all parameters": ("gpt2", "dp_shard2-tp2", {"optim": {"decay_norms": True, "weight_decay": 30.0}}),
    "no decay of norms": ("gpt2", "dp_shard2-tp2", {"optim": {"weight_decay": 30.0}}),
    "no decay of experts' biases and sinks": (
        *("gpt_oss", "ep2"),
        {"optim": {"weight_decay": 30.0}, "model": {"attn": "eager"}, "data": {"packing": False}},
    ),
    "ulysses, sliding windows": ("gemma3_text", "dp_shard2-cp2", {}),
    "ulysses, learned positions": ("gpt2", "cp4", {}),
    "ulysses, whole documents in a row": ("qwen3", "cp2", {"data": {"packing": "best_fit", "seq_len": 64}}),
    "ring, whole documents in a row": (
        *("llama", "dp_shard2-cp2", RING | {"data": {"packing": "best_fit", "seq_len": 64}}),
    ),
    "ulysses, one document a row": ("qwen3", "cp2", {"data": {"packing": False}}),
    "ulysses under tp": ("qwen3", "cp2-tp2", {}),
    "ulysses, key-value heads on several ranks": ("qwen3_gqa", "cp4", {}),
    "ulysses, a sequence that does not divide": ("qwen3_moe", "cp4", {"data": {"seq_len": 30}}),
    "ulysses, recomputed blocks": ("llama", "dp_shard2-cp2", {"train": {"activation_checkpointing": "full"}}),
    "ring, sliding windows": ("gemma3_text", "dp_shard2-cp2", RING),
    "ring, soft caps": ("gemma2", "cp2", RING | {"model": {"attn": "eager"}}),
    "ring, frequencies by the length of the sequence": (
        *("llama_dynamic", "dp_shard2-cp2", RING | {"data": {"packing": False}}),
    ),
    "ring under tp": ("qwen3", "cp2-tp2", RING),
    "ring, more ranks than heads, a sequence that does not divide": (
        "llama_two_heads",
        "cp4",
        {"data": {"seq_len": 30}},
    ),
    "ring, recomputed blocks, replicas": (
        *("llama", "dp_replicate2-cp2", RING | {"train": {"activation_checkpointing": "full"}}),
    ),
    "ulysses, masks that know images": ("gemma4_unified", "cp2", {"data": {"packing": False}}),
    "ulysses, keys of an indexer": ("deepseek_v32", "cp2", {"data": {"packing": False}}),
    "ulysses, positions counted by their embedding": (
        *("bart", "cp2", {"cp": {"kind": "ulysses"}, "data": {"packing": False, "seq_len": 31}}),
    ),
    "ring, positions counted from the padding id": ("camembert", "cp2", RING | {"data": {"packing": False}}),
    "experts under ring": ("qwen3_moe", "dp_shard2-cp2-ep4", RING | {"data": {"packing": False}}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_train_like_plain_transformers(world: dict[str, Any], tmp_path: Path, option: str) -> None:
    kind, mesh, more = OPTIONS[option]
    recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=2, steps=4, **more)
    if option == "sequence parallelism that fails" and not hasattr(FSDPModule, "reset_iter_state"):
        # Before torch 2.13 FSDP cannot forget a step that failed, so the run is refused; the way out has to work.
        with pytest.raises(AssertionError, match=r"dbrx does not run with .*; set tp\.sequence_parallel = false"):
            get_pool(ranks_of(ALL_MESHES[mesh])).run(trained, str(recipe), [], timeout=300)
        more = {**more, "tp": {"sequence_parallel": False}}
        recipe = recipe_for(world, tmp_path, kind, mesh, accumulation=2, steps=4, **more)
    result = get_pool(ranks_of(ALL_MESHES[mesh])).run(trained, str(recipe), [], timeout=300)[0]
    want = reference(model_dir(world, kind), recipe)
    for metrics, (loss, norm) in zip(result["metrics"], want, strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def trained_unasked(path: str, question: str) -> None:
    """`trained`, where nothing is known of the model's code that `question`, a function of ndtrain, would find."""
    with mock.patch(question, lambda *args: None):
        trained(path, [], proves=True)


@pytest.mark.parametrize(
    ("kind", "question", "kind_of_cp", "words"),
    [
        ("camembert", "parallel.cp.interface.positions_from_ids", "ring", "camembert .* differs from the whole"),
        ("deepseek_v32", "parallel.cp.ulysses.chooses_keys", "ulysses", "deepseek_v32 does not run on cp 2"),
        ("doge", "plan.context.chooses_keys", "ring", "DogeAttention changes its attention mask or makes its own"),
    ],
)
def test_what_only_the_model_itself_shows_is_refused(
    world: dict[str, Any], tmp_path: Path, kind: str, question: str, kind_of_cp: str, words: str
) -> None:
    recipe = recipe_for(world, tmp_path, kind, "cp2", data={"packing": False}, cp={"kind": kind_of_cp})
    with pytest.raises(AssertionError, match=f"PlanError: {words}"):
        get_pool(2).run(trained_unasked, str(recipe), f"ndtrain.{question}", timeout=200)


def test_styles_that_do_not_fit_the_model_are_what_is_to_be_corrected(world: dict[str, Any], tmp_path: Path) -> None:
    plan = {"model.layers.*.mlp.up_proj": "colwise_gather_output"}
    recipe = recipe_for(world, tmp_path, "llama", "tp2", tp={"plan": plan})
    with pytest.raises(AssertionError, match=r"PlanError: llama does not run on tp 2 .*; correct \[tp\.plan\], or set"):
        get_pool(2).run(trained, str(recipe), [], timeout=200)


def shapes_of_norms(path: str) -> tuple[bool, list[tuple[int, ...]], list[str]]:
    """Whether sequence parallelism is on after `prepare`, what norms of a block take in a step, the notes."""
    from tests.trainers import Said, trainer_of

    notes = Said()
    trainer = trainer_of(path, said=notes)
    trainer.prepare()
    shapes: list[tuple[int, ...]] = []
    for module in trainer.engine.model.get_submodule(trainer.plan.blocks[0]).modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    trainer.train_step()
    return trainer.engine.sequence is not None and trainer.engine.sequence.enabled, shapes, notes.said


def test_norms_of_blocks_work_on_a_share_of_the_tokens(world: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "tp2", data={"packing": False})
    for enabled, shapes, _ in get_pool(2).run(shapes_of_norms, str(recipe), timeout=200):
        assert enabled and set(shapes) == {(1, 128, 64)}


def test_norms_of_blocks_work_on_every_token_without_sequence_parallelism(
    world: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "tp2", data={"packing": False}, tp={"sequence_parallel": False})
    for enabled, shapes, _ in get_pool(2).run(shapes_of_norms, str(recipe), timeout=200):
        assert not enabled and set(shapes) == {(8, 32, 64)}


def test_sequence_parallelism_that_changes_a_model_is_left_out_with_a_note(
    world: dict[str, Any], tmp_path: Path
) -> None:
    # Two modules share the two layers of its MLP: what the first gives is cut by features.
    recipe = recipe_for(world, tmp_path, "bert", "tp2", data={"packing": False})
    for enabled, shapes, notes in get_pool(2).run(shapes_of_norms, str(recipe), timeout=200):
        assert not enabled and set(shapes) == {(8, 32, 64)}
        assert any("no sequence parallelism: bert" in note for note in notes)


def four_steps(world: dict[str, Any], folder: Path, kind: str, mesh: str, **sections: Any) -> list[float]:
    """Losses and gradient norms of 4 steps."""
    folder.mkdir()
    sections["train"] = {"micro_batch_size": 4, "steps": 4, **sections.get("train", {})}
    recipe = recipe_for(world, folder, kind, mesh, **sections)
    steps = get_pool(ranks_of(ALL_MESHES[mesh])).run(trained, str(recipe), [], timeout=300)[0]["metrics"]
    return [step[key] for step in steps for key in ("loss", "grad_norm")]


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_apart_train_like_experts_together(world: dict[str, Any], tmp_path: Path, kind: str) -> None:
    more: dict[str, Any] = {"model": {"attn": "eager"}, "data": {"packing": False}} if kind == "gpt_oss" else {}
    together, spread = (four_steps(world, tmp_path / mesh, kind, mesh, **more) for mesh in ("dp_shard2", "ep2"))
    assert apart(spread, together) < 1e-6


def test_experts_apart_are_no_further_in_bfloat16_than_other_micro_batches(
    world: dict[str, Any], tmp_path: Path
) -> None:
    low: dict[str, Any] = {"fsdp": {"param_dtype": "bfloat16"}}
    runs = [
        four_steps(world, tmp_path / f"{mesh}-{micro}", "qwen3_moe", mesh, **low, train={"micro_batch_size": micro})
        for mesh, micro in (("1", 8), ("1", 2), ("1", 1), ("dp_shard2", 4), ("ep2", 4))
    ]
    losses = [run[::2] for run in runs]
    # What rounding alone does varies from pair to pair: the furthest is the measure.
    assert apart(losses[3], losses[4]) <= max(apart(a, b) for a, b in itertools.combinations(losses[:3], 2))


def sabotaged(recipe_path: str, overrides: list[str], where: str) -> None:
    """Like `trained`, on a model one part of which is wrong in the same way on every rank."""
    from ndtrain.engine import engine as module

    right = module.parallelize

    def wrong(model: Any, *args: Any, **kwargs: Any) -> Any:
        made = right(model, *args, **kwargs)
        if where == "split":  # what is wrong only where the sequence is split, as a lost boundary would be
            layer = model.get_submodule("model.layers.1.self_attn")
            layer.register_forward_hook(
                lambda module, args, output: (output[0] * 1.1, *output[1:]) if made.context.enabled else output
            )
        elif where == "backward":
            layer = model.get_submodule("model.layers.1.mlp")
            layer.register_forward_hook(lambda module, args, output: 0.5 * output + 0.5 * output.detach())
        else:
            model.get_submodule(where).register_forward_hook(lambda module, args, output: 1.1 * output)
        return made

    module.parallelize = wrong
    try:
        trained(recipe_path, overrides, proves=True)
    finally:
        module.parallelize = right


SABOTAGED = {
    "tp2": ("llama", ["tp.sequence_parallel=false"], "tp"),
    "tp2-sequence": ("llama", [], "tp"),
    "ep2": ("qwen3_moe", [], "ep"),
    "cp2-ulysses": ("llama", ["cp.kind=ulysses"], "cp"),
    "cp2-ring": ("llama", ["cp.kind=ring"], "cp"),
    "dp_shard2": ("llama", [], "dp_shard"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", SABOTAGED)
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("model.layers.1.mlp", "the output of model.layers.1 differs"),
        ("backward", "the gradient of .*model.layers.1.* differs"),
    ],
)
def test_a_wrong_block_is_refused_though_all_ranks_agree(
    world: dict[str, Any], tmp_path: Path, mesh: str, dtype: str, where: str, words: str
) -> None:
    kind, overrides, axis = SABOTAGED[mesh]
    recipe = recipe_for(world, tmp_path, kind, mesh.replace("-sequence", "").split("-")[0])
    with pytest.raises(AssertionError, match=rf"PlanError: {kind} under .*mesh\.{axis} = 2: {words} from that of one"):
        get_pool(2).run(sabotaged, str(recipe), [*overrides, f"fsdp.param_dtype={dtype}"], where, timeout=200)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["model.embed_tokens", "model.norm", "lm_head"])
def test_a_wrong_part_outside_the_blocks_is_refused(
    world: dict[str, Any], tmp_path: Path, part: str, dtype: str
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "tp2")
    with pytest.raises(AssertionError, match=f"PlanError: llama under mesh.tp = 2: the output of {part} differs"):
        get_pool(2).run(sabotaged, str(recipe), [f"fsdp.param_dtype={dtype}"], part, timeout=200)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_what_is_wrong_only_in_split_sequences_is_refused(
    world: dict[str, Any], tmp_path: Path, kind: str, dtype: str
) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "cp2")
    overrides = [f"cp.kind={kind}", f"fsdp.param_dtype={dtype}"]
    with pytest.raises(AssertionError, match=r"PlanError: llama under mesh\.cp = 2 differs from the"):
        get_pool(2).run(sabotaged, str(recipe), overrides, "split", timeout=200)


def started(path: str, overrides: list[str]) -> tuple[int, list[str], bool | None]:
    """How often a run proves before its first step, what it says, and whether it keeps sequence parallelism."""
    from ndtrain import proof
    from tests.trainers import Said, trainer_of

    said = Said()
    with mock.patch.object(proof, "prove", wraps=proof.prove) as prove:
        trainer = trainer_of(path, overrides, said=said)
        trainer.prepare()
    return prove.call_count, said.said, trainer.engine.sequence and trainer.engine.sequence.enabled


def test_a_proof_is_remembered_for_the_same_model_mesh_and_recipe(world: dict[str, Any], tmp_path: Path) -> None:
    # Its sequence parallelism is left out with a note, which a later start says again.
    recipe = recipe_for(world, tmp_path, "bert", "tp2", data={"packing": False})

    def start(*overrides: str) -> tuple[int, list[str], bool | None]:
        return get_pool(2).run(started, str(recipe), list(overrides), timeout=200)[0]

    first, again = start(), start("optim.lr=1e-5", "train.steps=3")
    assert (first[0], again[0]) == (1, 0) and first[2] is again[2] is False
    assert (
        [line for line in first[1] if "no sequence parallelism" in line]
        == [line for line in again[1] if "no sequence parallelism" in line]
        != []
    )
    assert start("data.seq_len=16")[0] == start("fsdp.param_dtype=bfloat16")[0] == 1
    assert start("fsdp.param_dtype=bfloat16")[0] == 0
    record = tmp_path / "run/proof.json"
    for text in ("{", "[]", record.read_text().replace("identity", "other")):
        record.write_text(text)
        assert start("fsdp.param_dtype=bfloat16")[0] == 1


def test_bf16_compute_keeps_fp32_masters(world: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_for(world, tmp_path, "qwen3", "dp_shard2-tp2", steps=4, fsdp={"param_dtype": "bfloat16"})
    result = get_pool(4).run(trained, str(recipe), [], timeout=300)[0]
    for metrics, (loss, norm) in zip(result["metrics"], expected(world, "qwen3", recipe), strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=2e-2)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=5e-2)
    files = sorted((tmp_path / "run/checkpoints/step-00000004/model").glob("*.safetensors"))
    assert {t.dtype for f in files for t in load_file(f).values()} == {torch.float32}


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_moe", "phi3"])
def test_packed_documents_never_see_each_other(world: dict[str, Any], kind: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir(world, kind)).eval()
    first, second = torch.arange(10, 20)[None], torch.arange(40, 61)[None]
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(10), torch.arange(21)])[None]
    together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
    for part, logits in ((first, together[:, :10]), (second, together[:, 10:])):
        alone = model(input_ids=part, use_cache=False).logits
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)


def test_a_model_whose_mask_leaks_between_documents_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_for(world, tmp_path, "xglm", "dp_shard2", model={"attn": "eager"})
    with pytest.raises(AssertionError, match="packed documents see each other"):
        get_pool(2).run(trained, str(recipe), [], timeout=200)


def poisoned(path: str, at: int, what: str, stop: int | None) -> list[dict[str, Any]]:
    """`trained`, where at step `at` one rank's gradient, or what it knows of the loss, is not a number.

    What is due then waits for a good step; so a run that is to stop there is asked to save.
    """
    from ndtrain.engine.loss import LossModel

    backward, calls = LossModel.backward, []

    def poisonous(self: LossModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = backward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == at == stop:
            (Path(path).parent / "run" / "save").touch()
        if torch.distributed.get_rank() == 1 and len(calls) == at:
            if what == "loss":
                return result * math.nan
            next(p for p in self.model.parameters() if p.grad is not None).grad.to_local().fill_(math.nan)
        return result

    with mock.patch.object(LossModel, "backward", poisonous):
        return trained(path, [], stop)["metrics"]


def numbers(metrics: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(m["step"], m["loss"], m["grad_norm"], m["lr"], m.get("skipped", 0)) for m in metrics]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(world: dict[str, Any], tmp_path: Path) -> None:
    runs = {}
    for name, stops in (("whole", [(3, None)]), ("cut", [(3, 3), (0, None)]), ("loss", [(3, 4)])):
        (tmp_path / name).mkdir()
        recipe = recipe_for(
            world, tmp_path / name, "llama", "dp_shard2", steps=6, checkpoint={"every": 3, "resume": "auto"}
        )
        what = "loss" if name == "loss" else "gradient"
        for at, stop in stops:
            runs[name] = get_pool(2).run(poisoned, str(recipe), at, what, stop, timeout=200)[0]
    want = reference(model_dir(world, "llama"), recipe, without=(3,))
    for m, (loss, norm) in zip(runs["whole"], want, strict=True):
        if m["step"] != 3:
            assert (m["loss"], m["grad_norm"]) == pytest.approx((loss, norm), rel=1e-4), m
    assert [m.get("skipped") for m in runs["whole"]] == [None, None, 1, 1, 1, 1]
    assert runs["whole"][2]["grad_norm"] is None and runs["whole"][2]["loss"] == pytest.approx(want[2][0], rel=1e-4)
    assert numbers(runs["cut"]) == numbers(runs["whole"])
    assert runs["loss"][2]["loss"] is None
    assert numbers(runs["loss"])[3] == numbers(runs["whole"])[3]
    folders = {name: tmp_path / name / "run" / "checkpoints" for name in runs}
    assert sorted(p.name for p in folders["whole"].iterdir()) == ["step-00000004", "step-00000006"]
    for part in ("model", "optim"):
        files = sorted((folders["whole"] / "step-00000006" / part).glob("*.safetensors"))
        assert len(files) == 2
        for file in files:
            assert file.read_bytes() == (folders["cut"] / "step-00000006" / part / file.name).read_bytes()


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(world: dict[str, Any], tmp_path: Path) -> None:
    optim = {"lr": 1e30, "max_grad_norm": 1e30}
    recipe = recipe_for(
        world,
        tmp_path,
        "llama",
        "dp_shard2",
        optim=optim,
        checkpoint={"every": 1, "keep": 1},
        train={"max_bad_steps": 3},
    )
    with pytest.raises(
        AssertionError,
        match=r"NdtrainError: steps 2 to 4 skipped, .*: loss .* No weight changed and nothing .*step 1 is complete",
    ):
        get_pool(2).run(trained, str(recipe), [], timeout=200)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(None in (m["loss"], m["grad_norm"]), m.get("skipped")) for m in lines] == [
        (False, None),
        *[(True, n) for n in (1, 2, 3)],
    ]


def with_weight(path: str, value: float) -> None:
    """`trained`, where one rank's part of a weight becomes `value` in the update of the second step."""
    from ndtrain.train import Trainer

    step = Trainer.optimize

    def overflowing(self: Trainer) -> Any:
        metrics = step(self)
        if self.step == 2 and self.runtime.rank == 1:
            with torch.no_grad():
                next(self.engine.model.parameters()).to_local()[0] = value
        return metrics

    with mock.patch.object(Trainer, "optimize", overflowing):
        trained(path, [])


def test_weights_that_are_not_finite_are_not_saved(world: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", checkpoint={"every": 1})
    with pytest.raises(AssertionError, match=r"step 2: model.embed_tokens.weight is not finite after the update"):
        get_pool(2).run(with_weight, str(recipe), math.inf, timeout=200)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001"]


def trained_with_flash(path: str, overrides: list[str]) -> dict[str, Any]:
    """`trained` with an attention function that, like flash attention, sees documents in batches of one row only.

    In a run in bfloat16 it takes nothing else, like flash attention.
    """
    low = "fsdp.param_dtype=bfloat16" in overrides
    from transformers.masking_utils import AttentionMaskInterface

    def flash(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        size = query.shape[2]
        if low and {query.dtype, key.dtype, value.dtype} != {torch.bfloat16}:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        if query.shape[0] == 1:
            documents = (kwargs["position_ids"][0].diff(prepend=torch.tensor([-1])) != 1).cumsum(0)
            mask = mask & (documents[:, None] == documents[None])
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=kwargs["scaling"])
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("flash_of_the_test", flash)
    AttentionMaskInterface.register("flash_of_the_test", lambda *args, **kwargs: None)
    # Where transformers looks for a kernel of that name
    with mock.patch("transformers.modeling_utils.lazy_import_flash_attention"):
        return trained(path, overrides, proves=True)


FLASH: dict[str, tuple[str, str, int, str, float, float]] = {
    "documents apart in batches of several rows": ("dp_shard2", "auto", 4, "train.micro_batch_size=4", 1e-4, 1e-4),
    "the same, Ulysses": ("cp2", "ulysses", 4, "train.micro_batch_size=4", 1e-4, 1e-4),
    "the same, ring": ("cp2", "ring", 4, "train.micro_batch_size=4", 1e-4, 1e-4),
    "bfloat16 alone, while the proof is in float32": ("tp2", "auto", 3, "fsdp.param_dtype=bfloat16", 2e-2, 5e-2),
    "the same, tokens over cp": ("cp2", "ulysses", 3, "fsdp.param_dtype=bfloat16", 2e-2, 5e-2),
}


@pytest.mark.parametrize("case", FLASH)
def test_flash_attention_gets_what_it_takes(world: dict[str, Any], tmp_path: Path, case: str) -> None:
    mesh, kind, steps, override, near, nearly = FLASH[case]
    recipe = recipe_for(world, tmp_path, "llama", mesh, steps=steps, cp={"kind": kind})
    want = reference(model_dir(world, "llama"), recipe)
    overrides = ["model.attn=flash_of_the_test", override]
    result = get_pool(2).run(trained_with_flash, str(recipe), overrides, timeout=200)[0]
    for metrics, (loss, norm) in zip(result["metrics"], want, strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=near)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=nearly)


def test_reduce_dtype_acts_under_float32(world: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_for(world, tmp_path, "llama", "dp_shard2", steps=3, fsdp={"reduce_dtype": "bfloat16"})
    result = get_pool(2).run(trained, str(recipe), [], timeout=200)[0]
    loss, norm = reference(model_dir(world, "llama"), recipe)[0]
    got = result["metrics"][0]
    assert got["loss"] == pytest.approx(loss, rel=1e-5)
    assert abs(got["grad_norm"] / norm - 1) > 1e-6 and got["grad_norm"] == pytest.approx(norm, rel=1e-2)
