"""What the keys of a recipe may not say together, and what they may not say yet.

A rule that is broken is a `(path, sentence)` pair: the path of the key to point at, and a sentence about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndtrain.recipe.schema import Recipe

Path = tuple[str, ...]
Problem = tuple[Path, str]


class RulesBroken(ValueError):
    """Sections that are each well formed break these rules."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(sentence for _, sentence in problems))
        self.problems = problems


# Path -> values that work today, and why the others do not.
NOT_YET: dict[Path, tuple[tuple[Any, ...], str]] = {
    ("fsdp", "mode"): (("auto",), 'sharding units chosen by hand come later; leave it at "auto"'),
    ("fsdp", "modules"): (({},), "policies for single modules come later; leave the table out"),
    ("fsdp", "cpu_offload"): ((False,), "offloading to the host comes later; leave it false"),
    ("fsdp", "param_dtype"): (
        ("float32", "bfloat16"),
        'float16 needs loss scaling, which ndtrain does not have; take "bfloat16" or "float32"',
    ),
    ("fsdp", "reduce_dtype"): (
        ("float32", "bfloat16"),
        'sums of float16 gradients overflow without loss scaling; take "float32" or "bfloat16"',
    ),
    ("tp", "sequence_parallel"): ((False,), "sequence parallelism comes later; leave it false"),
    ("model", "experts"): (
        ("auto",),
        'the choice of an experts implementation comes later; leave it at "auto"',
    ),
    ("model", "dtype"): (
        ("float32",),
        "master parameters are float32 for now; fsdp.param_dtype sets the compute dtype",
    ),
    ("data", "format"): (("text",), 'only "text" can be read for now'),
    ("checkpoint", "async"): ((False,), "checkpoints are written in the foreground for now; leave it false"),
    ("checkpoint", "verify"): ((False,), "hashes of checkpoint files come later; leave it false"),
    ("train", "compile"): ((False,), "torch.compile comes later; leave it false"),
    ("train", "activation_checkpointing"): (
        ("none", "full"),
        'selective activation checkpointing comes later; take "full" or "none"',
    ),
}


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Yield what the keys of `recipe` say against each other."""
    model, data, schedule, train = recipe.model, recipe.data, recipe.schedule, recipe.train
    if model.name is None and model.type is None:
        yield (
            ("model", "name"),
            'model.name is required: a local directory or hub id; or, to start from scratch, model.type, e.g. "qwen3"',
        )
    if model.name is not None and model.type is not None:
        yield (
            ("model", "type"),
            f"model.name = {show(model.name)} and model.type = {show(model.type)} exclude each other; "
            "keep name to use an existing model or its config, type to start from scratch",
        )
    elif model.type is not None and model.init == "pretrained":
        yield (
            ("model", "init"),
            f'model.init = "pretrained" contradicts model.type = {show(model.type)}, which has no '
            'weights to load; set init = "random", or model.name instead of type',
        )
    if model.name is None and model.type is not None and data.tokenizer is None:
        yield (
            ("data", "tokenizer"),
            f"data.tokenizer is required with model.type = {show(model.type)}, which brings none; "
            'name a directory or hub id, or "bytes"',
        )
    if train.micro_batch_size > train.global_batch_size:
        yield (
            ("train", "micro_batch_size"),
            f"train.micro_batch_size = {train.micro_batch_size} is larger than "
            f"train.global_batch_size = {train.global_batch_size}; it may be at most that",
        )
    if schedule.warmup_steps >= train.steps:
        yield (
            ("schedule", "warmup_steps"),
            f"schedule.warmup_steps = {schedule.warmup_steps} must be less than train.steps = {train.steps}",
        )
    elif schedule.min_lr_ratio and schedule.kind == "constant":
        yield (
            ("schedule", "min_lr_ratio"),
            f'schedule.min_lr_ratio = {schedule.min_lr_ratio} has no meaning with schedule.kind = "constant"',
        )
    elif schedule.kind == "wsd" and schedule.warmup_steps + (schedule.decay_steps or 0) > train.steps:
        yield (
            ("schedule", "decay_steps"),
            f"schedule.decay_steps = {schedule.decay_steps} and warmup_steps = {schedule.warmup_steps} are "
            f"together more than train.steps = {train.steps}",
        )
    if schedule.decay_steps is not None and schedule.kind != "wsd":
        yield (
            ("schedule", "decay_steps"),
            f"schedule.decay_steps = {schedule.decay_steps} has no meaning with schedule.kind = "
            f'{show(schedule.kind)}; it belongs to kind = "wsd"',
        )


def not_yet(recipe: Recipe) -> Iterator[Problem]:
    """Yield what `recipe` asks for that this version cannot do: refused, never ignored."""
    values = recipe.model_dump(by_alias=True)
    for path, (works, why) in NOT_YET.items():
        value = values[path[0]][path[1]]
        if value not in works:
            yield path, f"{dotted(path)} = {show(value)} is not available in this version: {why}"


def dotted(path: Path) -> str:
    """`("tp", "plan", "a.b")` as TOML spells it: `tp.plan."a.b"`."""
    return ".".join(
        key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else show(key) for key in path
    )


def show(value: Any) -> str:
    """A value as TOML spells it, on one line and cut to a length that a message can bear."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
