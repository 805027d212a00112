"""What the keys of a recipe may not say together, and what they may not say yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ndtrain.recipe.problems import Path, Problem, dotted, show
from ndtrain.recipe.schema import Recipe

# Path -> values that work today, and why the others do not.
NOT_YET: dict[Path, tuple[tuple[Any, ...], str]] = {
    ("fsdp", "param_dtype"): (
        ("float32", "bfloat16"),
        'float16 needs loss scaling, which ndtrain does not have; take "bfloat16" or "float32"',
    ),
    ("fsdp", "reduce_dtype"): (
        ("float32", "bfloat16"),
        'sums of float16 gradients overflow without loss scaling; take "float32" or "bfloat16"',
    ),
    ("model", "experts"): (
        ("auto",),
        'the choice of an experts implementation comes later; leave it at "auto"',
    ),
    ("model", "dtype"): (
        ("float32",),
        "master parameters are float32 for now; fsdp.param_dtype sets the compute dtype",
    ),
    ("data", "format"): (("text",), 'only "text" can be read for now'),
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
    yield from _fsdp(recipe)
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


def _fsdp(recipe: Recipe) -> Iterator[Problem]:
    fsdp = recipe.fsdp
    if fsdp.modules and fsdp.mode != "manual":
        yield (
            ("fsdp", "modules"),
            f'[fsdp.modules] contradicts fsdp.mode = {show(fsdp.mode)}; set mode = "manual", or leave the table out',
        )
    if fsdp.mode == "manual" and not fsdp.modules:
        yield (
            ("fsdp", "mode"),
            'fsdp.mode = "manual" needs the modules to shard as units in [fsdp.modules]; '
            'name them, or set mode = "auto"',
        )
    for pattern, policy in fsdp.modules.items():
        if policy.mixed_precision is True and fsdp.param_dtype == "float32":
            at = ("fsdp", "modules", pattern)
            yield (
                at,
                f'{dotted(at)} asks for mixed_precision, but fsdp.param_dtype is "float32"; name the dtype: '
                'mixed_precision = "bfloat16"',
            )


def not_yet(recipe: Recipe) -> Iterator[Problem]:
    """Yield what `recipe` asks for that this version cannot do: refused, never ignored."""
    values = recipe.model_dump(by_alias=True)
    for path, (works, why) in NOT_YET.items():
        value = values[path[0]][path[1]]
        if value not in works:
            yield path, f"{dotted(path)} = {show(value)} is not available in this version: {why}"
