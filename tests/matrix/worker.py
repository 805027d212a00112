"""What the ranks of the matrix run: the plain reference of one model type, and one cell of the table."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ndtrain.data import Order
from ndtrain.engine import engine
from ndtrain.engine.loss import IGNORE
from ndtrain.errors import NdtrainError, PlanError
from ndtrain.hf.model import meta_model
from ndtrain.layout import held_boxes, local_part
from ndtrain.mesh import Meshes, MeshSizes, build_mesh
from ndtrain.plan import make_plan
from ndtrain.recipe import load_recipe
from ndtrain.runs.process import Runtime
from ndtrain.train import Silent, Trainer, sizes_for
from tests.tiny import decay_groups, recipe_text

# 30 tokens are padded to 32 by ring attention, which cuts a sequence into 4.
STEPS, ROWS, SEQ = 3, 8, 30
# With a large eps AdamW's update follows the gradient also where that is rounding alone.
OPTIM = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
TOLERANCE = 1e-4
# Of losses and gradient norms that bfloat16 gives, against those of float32.
LOW_TOLERANCE = 0.1
ROUTER_COEFFICIENT = 0.5


def rows(vocab: int, step: int) -> dict[str, Tensor]:
    """The global batch of a step: int64 [ROWS, SEQ], with labels of ragged lengths."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(3, vocab, (ROWS, SEQ + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for i in range(ROWS):
        labels[i, SEQ - (5 * i + step) % (SEQ - 4) :] = IGNORE
    positions = torch.arange(SEQ).repeat(ROWS, 1)
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels, "position_ids": positions}


class Batches:
    """The part of `GlobalBatches` that a Trainer uses, over `rows`."""

    def __init__(self, vocab: int, *, micro: int, rank: int, ranks: int):
        self.micro_batch_size = micro
        self.vocab, self.micro, self.rank, self.ranks = vocab, micro, rank, ranks
        self.micro_steps = ROWS // (micro * ranks)
        self.fingerprint = "matrix"
        self.samples = range(1000)
        self.order = Order(len(self.samples), seed=0, shuffle=False)

    def sources_of(self, cursor: int) -> None:
        return None

    def load(self, cursor: int) -> list[dict[str, Tensor]]:
        batch = rows(self.vocab, cursor // ROWS)
        starts = [(i * self.ranks + self.rank) * self.micro for i in range(self.micro_steps)]
        return [{k: v[s : s + self.micro] for k, v in batch.items()} for s in starts]


def build(kind: str, config: dict[str, Any], folder: str, router_loss: bool = False) -> dict[str, Any]:
    """Save a random model of `kind` and its reference run; what a recipe needs to know of it.

    `router_loss` has the model add its router's auxiliary loss, with a coefficient large enough to be seen.
    """
    torch.manual_seed(7)
    made = transformers.AutoConfig.for_model(kind, **config)
    for part in (made, *(getattr(made, name, None) for name in made.sub_configs)):
        for key, value in part.to_dict().items() if part is not None else ():
            if isinstance(value, float) and ("drop" in key or "jitter" in key):
                setattr(part, key, 0.0)
    if router_loss:
        made.output_router_logits = True
        for key in {"router_aux_loss_coef", "aux_loss_coef"} & made.to_dict().keys():
            setattr(made, key, ROUTER_COEFFICIENT)
    try:
        model, attn = from_config(made, "sdpa"), "sdpa"
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        model, attn = from_config(made, "eager"), "eager"
    if sum(p.numel() for p in model.parameters()) > 5e6:
        raise ValueError("more than 5 M parameters")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
        # Ids that are valid as inputs and as labels: some embeddings have rows for more than text.
        width = model(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=False).logits.shape[-1]
    vocab = min(width, int(model.get_input_embeddings().weight.shape[0]))  # type: ignore[union-attr,index,arg-type]
    path = Path(folder) / kind
    model.save_pretrained(path)
    if type(model.config) is not type(made):
        # The text part of a composite model alone: its checkpoints carry the composite config.
        made.dtype = torch.float32
        made.save_pretrained(path)
    frozen = reference(path, attn, vocab)
    return {"kind": kind, "path": str(path), "attn": attn, "vocab": vocab, "untrained": frozen}


def from_config(config: Any, attn: str) -> Any:
    made = copy.deepcopy(config)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation=attn)


def loaded(path: Path, attn: str, dtype: torch.dtype) -> Any:
    """The model in `path` as plain transformers loads it, with what its class freezes frozen.

    `from_pretrained` makes everything trainable that it finds in the files (5.24), sinusoidal positions too; what it
    does not find there, and what it loads onto a mesh, keeps what the class says.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attn)
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(model.config))
    for name, param in made.named_parameters():
        model.get_parameter(name).requires_grad_(param.requires_grad)
    return model


def reference(path: Path, attn: str, vocab: int) -> list[str]:
    """Train plain transformers; the parameters that got no gradient or nothing but zeros."""
    model = loaded(path, attn, torch.float32)
    params = dict(model.named_parameters())
    tensors = {f"start.{n}": p.detach().clone() for n, p in params.items()}
    numbers: dict[str, list[float]] = {}
    for step in plain_steps(model, vocab):
        if not numbers:
            tensors.update({f"grad.{n}": p.grad.clone() for n, p in params.items() if p.grad is not None})
        for what, value in step.items():
            numbers.setdefault(what, []).append(value)
    tensors.update({f"param.{n}": p.detach().clone() for n, p in params.items()})
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "reference.st")
    found = {"numbers": numbers, "rounding": rounding(path, attn, vocab, numbers)}
    (path / "reference.json").write_text(json.dumps(found))
    values = [v for column in numbers.values() for v in column]
    if not all(map(math.isfinite, values)) or len(set(numbers["loss"])) == 1:
        raise ValueError(f"does not train: {numbers}")
    return [n for n in params if f"grad.{n}" not in tensors or not tensors[f"grad.{n}"].any()]


def plain_optimizer(model: torch.nn.Module, **more: Any) -> torch.optim.Optimizer:
    keys = {k: v for k, v in OPTIM.items() if k not in ("max_grad_norm", "weight_decay")}
    return torch.optim.AdamW(decay_groups(model, 0.1), **keys, **more)  # type: ignore[arg-type]


def plain_steps(model: Any, vocab: int) -> Iterator[dict[str, float]]:
    """Steps of torch.optim on `rows`, each yielded before the optimizer moves the parameters."""
    model.train()
    optimizer = plain_optimizer(model)
    routed = getattr(model.config, "output_router_logits", False)
    for step in range(STEPS):
        batch = rows(vocab, step)
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten())
        found = {"loss": loss.item()}
        if routed:
            aux = router_loss(model, batch)
            loss, found["aux_loss"] = loss + ROUTER_COEFFICIENT * aux, aux.item()
        loss.backward()
        found["grad_norm"] = float(
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        )
        yield found
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["max_grad_norm"])  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()


def rounding(path: Path, attn: str, vocab: int, numbers: dict[str, list[float]]) -> float:
    """How far plain transformers in float32 is from itself in float64, where it runs in that: no run can be nearer."""
    try:
        model = loaded(path, attn, torch.float64)
        exact = list(plain_steps(model, vocab))
    except RuntimeError:
        return 0.0
    return max(
        abs(got - step[what]) / abs(step[what])
        for what in numbers
        for got, step in zip(numbers[what], exact, strict=True)
    )


def router_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over rows of transformers' own auxiliary loss, padding (what follows the last target) masked."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        mask = torch.zeros_like(ids)
        mask[: int((labels != IGNORE).nonzero().max()) + 2] = 1
        found.append(model(input_ids=ids[None], attention_mask=mask[None], use_cache=False).aux_loss)
    return torch.stack(found).mean()


@cache
def meshes_of(sizes: MeshSizes, device: str) -> Meshes:
    """One mesh for many cells: every new process group leaves a thread behind."""
    return build_mesh(sizes, device)


def whole(tensor: Tensor) -> tuple[Tensor, float]:
    """The global tensor, and the largest difference between replicas of an element; collective."""
    local = local_part(tensor)
    low, high = torch.full(tensor.shape, torch.inf), torch.full(tensor.shape, -torch.inf)
    for box in held_boxes(tensor):
        low[box.inside] = high[box.inside] = local[box.local].float()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return low, float((high - low).abs().max()) if low.numel() else 0.0


class MatrixTrainer(Trainer):
    vocab: int

    def open_tokenizer(self) -> None:
        self.engine.vocabulary = self.vocab

    def open_batches(self, resumed: Any = None) -> None:
        rank = self.sizes.coordinate(self.runtime.rank)["batch"]
        self.batches = Batches(  # type: ignore[assignment]
            self.vocab, micro=self.recipe.train.micro_batch_size, rank=rank, ranks=self.sizes.batch
        )

    def save(self) -> None:
        self.saving.step = self.step


def cell(model: dict[str, Any], mesh: dict[str, int], more: dict[str, Any]) -> dict[str, Any]:
    """Train on `mesh` and compare with the reference: {"status": agrees | refused | wrong, "worst", "what"}."""
    try:
        return _cell(model, mesh, more)
    except PlanError as error:
        return {"status": "refused", "what": str(error)}
    except NdtrainError as error:
        return {"status": "wrong", "what": f"{type(error).__name__}: {error}"}


def _cell(model: dict[str, Any], mesh: dict[str, int], more: dict[str, Any]) -> dict[str, Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    path = Path(model["path"])
    batch_ranks = mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)
    sections: dict[str, Any] = {
        "model": {"name": str(path), "attn": model["attn"]},
        "mesh": {"dp_shard": 1, **mesh},
        "fsdp": {"param_dtype": "float32"},
        "data": {"path": ".", "seq_len": SEQ, "tokenizer": "bytes", "packing": False},
        "optim": OPTIM,
        "schedule": {"kind": "constant"},
        "train": {"steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": ROWS // (2 * batch_ranks)},
        "checkpoint": {"every": 0, "resume": "never"},
        "run": {"dir": str(path / "run")},
    }
    for section, values in more.items():
        sections[section] = {**sections.get(section, {}), **values}
    recipe_path = path / f"recipe-{rank}.toml"
    recipe_path.write_text(recipe_text(**sections))
    recipe = load_recipe(recipe_path, [])
    meta = meta_model(recipe)
    plan = make_plan(meta, sizes_for(recipe, world), recipe)
    runtime = Runtime(rank=rank, local_rank=rank, world_size=world, device=torch.device("cpu"))
    trainer = MatrixTrainer(recipe, plan, meta, runtime=runtime, reporter=Silent())
    trainer.vocab = model["vocab"]
    grads: dict[str, Any] = {}
    clip = engine.clip_grad_norm

    def seen(*args: Any, **kwargs: Any) -> Any:
        if not grads:
            grads.update({n: p.grad.clone() for n, p in trainer.engine.model.named_parameters() if p.grad is not None})
        return clip(*args, **kwargs)

    engine.clip_grad_norm, engine.build_mesh = seen, meshes_of  # type: ignore[assignment]
    try:
        trainer.prepare()
        steps = [trainer.train_step() for _ in range(STEPS)]
    finally:
        engine.clip_grad_norm, engine.build_mesh = clip, build_mesh
    low = plan.low_precision
    found = compare_numbers(path, steps) if low else compare(path, trainer.engine.model, steps, grads)
    return found | {"sequence_parallel": trainer.engine.sequence is not None and trainer.engine.sequence.enabled}


def compare_numbers(path: Path, steps: list[Any]) -> dict[str, Any]:
    """Every rank's losses and gradient norms in bfloat16 against the float32 reference in `path`."""
    reference = json.loads((path / "reference.json").read_text())
    worst = [
        (abs(getattr(step, what) - ref) / abs(ref), f"{what} of step {i + 1}")
        for what, refs in reference["numbers"].items()
        for i, (step, ref) in enumerate(zip(steps, refs, strict=True))
    ]
    error, what = max((e if e == e else float("inf"), w) for e, w in worst)
    status = "agrees" if error < LOW_TOLERANCE else "wrong"
    return {"status": status, "worst": error, "what": what, "limit": LOW_TOLERANCE}


def compare(path: Path, model: Any, steps: list[Any], grads: dict[str, Tensor]) -> dict[str, Any]:
    """Every rank's steps, first gradients and last parameters against the reference in `path`; collective."""
    want = load_file(path / "reference.st")
    reference = json.loads((path / "reference.json").read_text())
    worst: list[tuple[float, str]] = []
    for what, refs in reference["numbers"].items():
        for i, (step, ref) in enumerate(zip(steps, refs, strict=True)):
            worst.append((abs(getattr(step, what) - ref) / abs(ref), f"{what} of step {i + 1}"))
    params = dict(model.named_parameters())
    if odd := {n.removeprefix("start.") for n in want if n.startswith("start.")} ^ set(params):
        return {"status": "wrong", "worst": math.inf, "what": f"other parameters: {sorted(odd)[:3]}"}
    total = sum(float(v.norm()) ** 2 for k, v in want.items() if k.startswith("grad.")) ** 0.5
    for name, param in params.items():
        ref = want.get(f"grad.{name}", torch.zeros(param.shape))
        got, spread = whole(grads[name]) if name in grads else (torch.zeros(param.shape), 0.0)
        # What is zero in exact arithmetic is compared against the whole gradient.
        scale = max(float(ref.norm()), 1e-3 * total)
        worst.append((float((got - ref).norm()) / scale, f"gradient of {name}"))
        worst.append((spread * ref.numel() ** 0.5 / scale, f"replicas of the gradient of {name}"))
        end, spread = whole(param)
        start, ref = want[f"start.{name}"], want[f"param.{name}"]
        moved = max(float((ref - start).norm()), 1e-5 * float(ref.norm()), 1e-6)
        worst.append((float((end - ref).norm()) / moved / 10, f"{name} after {STEPS} steps"))
        worst.append((spread * ref.numel() ** 0.5 / moved / 10, f"replicas of {name} after {STEPS} steps"))
    error, what = max((e if e == e else float("inf"), w) for e, w in worst)
    limit = max(TOLERANCE, reference["rounding"])
    return {"status": "agrees" if error < limit else "wrong", "worst": error, "what": what, "limit": limit}
