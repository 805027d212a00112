"""Find keys of a recipe that contradict each other, and values that are not supported yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ndtrain.recipe.data import COLUMNS, OF_SOURCE, DataSection
from ndtrain.recipe.problems import Key, Problem, dotted, index, show
from ndtrain.recipe.schema import Recipe, TrainSection
from ndtrain.recipe.sections import of_held_out, of_source

# The least share of a source that a mixture can keep: it has whole numbers of samples in a period of 1 << 16.
LEAST_SHARE = 2.0**-17

# Key -> (the supported values, why the others are refused).
NOT_YET: dict[Key, tuple[tuple[Any, ...], str]] = {
    ("optim", "state_dtype"): (("float32", "bfloat16"), 'ndtrain keeps no state in 8 bits yet; use "bfloat16"'),
    ("fsdp", "param_dtype"): (
        ("float32", "bfloat16"),
        'float16 needs loss scaling, which ndtrain does not have; use "bfloat16" or "float32"',
    ),
    ("fsdp", "reduce_dtype"): (
        ("float32", "bfloat16"),
        'sums of float16 gradients overflow without loss scaling; use "float32" or "bfloat16"',
    ),
    ("model", "experts"): (
        ("auto",),
        'ndtrain cannot choose an experts implementation yet; leave it at "auto"',
    ),
    ("model", "dtype"): (
        ("float32",),
        "master parameters are always float32; set the compute dtype with fsdp.param_dtype",
    ),
}


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each contradiction between keys of `recipe`."""
    model, data, train = recipe.model, recipe.data, recipe.train
    if model.name is None and model.type is None:
        yield (
            ("model", "name"),
            'model.name is required: a directory or a hub id; to train from scratch, set model.type, e.g. "qwen3"',
        )
    if model.name is not None and model.type is not None:
        yield (
            ("model", "type"),
            f"model.name = {show(model.name)} and model.type = {show(model.type)} exclude each other; "
            "keep name to use an existing model or its config, or type to train from scratch",
        )
    elif model.type is not None and model.init == "pretrained":
        yield (
            ("model", "init"),
            f'model.init = "pretrained" contradicts model.type = {show(model.type)}, which has no '
            'weights to load; set init = "random", or model.name instead of type',
        )
    if model.type is not None and model.revision != "main":
        yield (
            ("model", "revision"),
            f"model.revision = {show(model.revision)} is for models of the hub, not for model.type; leave it out",
        )
    yield from _fsdp(recipe)
    yield from _eval(recipe)
    if model.name is None and model.type is not None and data.tokenizer is None:
        yield (
            ("data", "tokenizer"),
            f"data.tokenizer is required with model.type = {show(model.type)}, which has no tokenizer of its own; "
            'set it to a directory, a hub id or "bytes"',
        )
    yield from _recomputation(train)
    yield from _groups(recipe)
    yield from _rows("data", recipe)
    if train.micro_batch_size > train.global_batch_size:
        yield (
            ("train", "micro_batch_size"),
            f"train.micro_batch_size = {train.micro_batch_size} is larger than "
            f"train.global_batch_size = {train.global_batch_size}; lower it",
        )
    if train.steps is None and train.epochs is None:
        yield ("train", "steps"), "train.steps is required, a whole number of at least 1, or train.epochs in its place"
    if train.steps is not None and train.epochs is not None:
        yield (
            ("train", "epochs"),
            f"train.steps = {train.steps} and train.epochs = {train.epochs} exclude each other; keep one",
        )
    if data.sources and data.stop == "never" and train.epochs is not None:
        yield (
            ("train", "epochs"),
            f'train.epochs = {train.epochs} needs to know of which source: set data.stop to "first", so that the run '
            'ends with the source that is read first, or to "all"; or set train.steps in place of epochs',
        )
    if data.window and (data.sources or train.epochs is not None):
        other, way = ("[[data.sources]]", "") if data.sources else ("train.epochs", ", or set train.steps in its place")
        yield (
            ("data", "window"),
            f"data.window = {show(data.window)} does not go with {other}: how many samples there are is not known "
            f"before all windows are prepared; leave it out{way}",
        )
    if data.stop != "never" and not data.sources:
        yield (
            ("data", "stop"),
            f"data.stop = {show(data.stop)} is for [[data.sources]]; leave it out",
        )
    yield from of_schedule(recipe)


def of_schedule(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each contradiction in [schedule], as far as the number of steps is known."""
    schedule, steps = recipe.schedule, recipe.train.steps
    warmup, decay = schedule.warmup_steps or 0, schedule.decay_steps or 0
    if steps is not None and warmup >= steps:
        yield (
            ("schedule", "warmup_steps"),
            f"schedule.warmup_steps = {warmup} must be less than train.steps = {steps}",
        )
    elif schedule.min_lr_ratio and schedule.kind == "constant":
        yield (
            ("schedule", "min_lr_ratio"),
            f'schedule.min_lr_ratio = {schedule.min_lr_ratio} does not apply to kind = "constant"; leave it out',
        )
    elif steps is not None and schedule.kind == "wsd" and warmup + decay > steps:
        yield (
            ("schedule", "decay_steps"),
            f"schedule.decay_steps = {decay} and warmup_steps = {warmup} are together more than "
            f"train.steps = {steps}; lower one of them",
        )
    if schedule.decay_steps is not None and schedule.kind != "wsd":
        yield (
            ("schedule", "decay_steps"),
            f"schedule.decay_steps = {schedule.decay_steps} does not apply to schedule.kind = "
            f'{show(schedule.kind)}; leave it out, or set kind = "wsd"',
        )


def _eval(recipe: Recipe) -> Iterator[Problem]:
    held_out, data = recipe.eval, recipe.data
    if held_out is None:
        if recipe.checkpoint.keep_best:
            yield (
                ("checkpoint", "keep_best"),
                "checkpoint.keep_best = true needs a held-out loss: give its data in [eval], or leave it out",
            )
        return
    for (_, *key), sentence in _rows("eval", recipe.held_out()):
        if len(key) > 1 or key[0] in ("path", "sources") or getattr(held_out, key[0]) != getattr(data, key[0]):
            yield ("eval", *key), of_held_out(sentence)  # else it is [data]'s
    if held_out.packing and not data.packing:
        yield (
            ("eval", "packing"),
            f"eval.packing = {show(held_out.packing)} needs packing in [data] too: only then is the model checked to "
            "keep packed documents apart; leave it out",
        )
    if held_out.patience is not None and not held_out.every:
        yield (
            ("eval", "patience"),
            f"eval.patience = {held_out.patience} needs evaluations before the end; set eval.every, or leave it out",
        )


def _rows(section: str, recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each contradiction between the keys that [data] and [eval] have, of the [data] of `recipe`.

    `section` is which of both that is.
    """
    data = recipe.data
    if data.path is None and not data.sources:
        yield ("data", "path"), "data.path is required: a file, a directory, a glob or a data set; or [[data.sources]]"
    if data.path is not None and data.sources:
        yield (
            ("data", "path"),
            f"data.path = {show(data.path)} and [[data.sources]] exclude each other; make the path one of the sources",
        )
    if not data.sources:
        yield from _data(data)
        return
    yield from of_sources(recipe, [dict(_data(part.data)) for part in recipe.parts()])
    labels = [source.label for source in data.sources]
    for number, source in enumerate(data.sources):
        at = ("data", "sources", index(number))
        if source.path is None:
            yield at, f"{dotted((*at, 'path'))} is required: a file, a directory, a glob or a data set"
        elif labels.index(source.label) < number:
            yield (
                at,
                f"{dotted(at)} has the name {show(source.label)}, as another source has; set its name to another one",
            )
        share = source.weight / sum(each.weight for each in data.sources)
        if section == "data" and share < LEAST_SHARE:
            yield (
                (*at, "weight"),
                f"{dotted((*at, 'weight'))} = {show(source.weight)} is {share:.1e} of the sequences, fewer than one in "
                f"{1 / LEAST_SHARE:,.0f}; raise it, or leave the source out",
            )
        if source.packing and not data.packing:
            yield (
                (*at, "packing"),
                f"{dotted((*at, 'packing'))} = {show(source.packing)} needs packing in [{section}] too: only then is "
                "the model checked to keep packed documents apart; leave it out",
            )


def of_sources(recipe: Recipe, found: Sequence[Mapping[Key, str]]) -> Iterator[Problem]:
    """Yield the problems found in each source of [data], each where it was written.

    A key of [data] that a source takes may be for other sources: it is a problem only if it is one in all of them.
    """
    for number, problems in enumerate(found):
        for at, sentence in problems.items():
            key = at[-1]
            if key in OF_SOURCE and getattr(recipe.data.sources[number], key) != getattr(recipe.data, key):
                yield ("data", "sources", index(number), key), of_source(sentence, number)
            elif number == 0 and all(at in other for other in found):
                yield at, sentence


def _data(data: DataSection) -> Iterator[Problem]:
    """Yield a problem for each contradiction between the keys of [data] that a source has too."""
    if data.tokenizer == "bytes" and data.special_tokens == "parse":
        yield (
            ("data", "special_tokens"),
            'data.special_tokens = "parse" does not apply to data.tokenizer = "bytes", to which all text is bytes; '
            "leave it out",
        )
    yield from _columns(data)
    yield from _packing(data) if data.format == "auto" else of_format(data.of_format(data.format))


def _columns(data: DataSection) -> Iterator[Problem]:
    formats = {name: own for name, own in COLUMNS.items() if data.format in ("auto", name)}
    if formats and data.columns and not any(data.columns.keys() <= set(own) for own in formats.values()):
        yield (
            ("data", "columns"),
            f"data.columns = {show(data.columns)} must have names of one format's fields: "
            + "; ".join(f"{name} has {', '.join(own)}" for name, own in formats.items()),
        )


# Keys of [data] that are for some formats only.
_FOR: dict[str, tuple[str, ...]] = {
    "columns": ("text", "chat"),
    "special_tokens": ("text",),
    "train_on": ("chat",),
    "chat_template": ("chat",),
    "on_control_text": ("chat",),
    "on_bad_row": ("text", "chat"),
    "window": ("text", "chat"),
    "documents": ("tokens",),
    "token_dtype": ("tokens",),
}


def of_format(data: DataSection) -> Iterator[Problem]:
    """Yield a problem for each key that contradicts the format of the data, which is known."""
    for name, formats in _FOR.items():
        value = getattr(data, name)
        if data.format not in formats and value != type(data).model_fields[name].default:
            yield (
                ("data", name),
                f"data.{name} = {show(value)} is for {' and '.join(formats)}, and the data's format is "
                f"{show(data.format)}; leave it out",
            )
    yield from _packing(data)


def _packing(data: DataSection) -> Iterator[Problem]:
    if data.packing == "concat" and data.format == "chat":
        yield (
            ("data", "packing"),
            'data.packing = "concat" cuts documents wherever a row ends, which is not for chat; set it to "best_fit" '
            "or false",
        )
    elif data.packing == "concat" and data.too_long not in (None, "cut"):
        yield (
            ("data", "too_long"),
            f'data.too_long = {show(data.too_long)} does not apply to data.packing = "concat", which cuts documents '
            'wherever a row ends; set data.packing = "best_fit" or false, or leave it out',
        )


def _recomputation(train: TrainSection) -> Iterator[Problem]:
    """Yield a problem where activation_checkpointing does not go with compile."""
    at, wanted = ("train", "activation_checkpointing"), train.activation_checkpointing
    if train.memory_budget is not None and not train.compile:
        yield (
            at,
            f"{dotted(at)} = {{ budget = {train.memory_budget:g} }} needs the compiler; set train.compile = true, or "
            'choose "selective"',
        )
    if wanted == "offload" and train.compile:
        yield at, f'{dotted(at)} = "offload" does not go with train.compile = true; choose "full", or leave compile out'


def _groups(recipe: Recipe) -> Iterator[Problem]:
    for key in ("momentum", "adjust_lr") if recipe.optim.name != "muon" else ():
        if (value := getattr(recipe.optim, key)) is not None:
            yield ("optim", key), f'optim.{key} = {show(value)} is for optim.name = "muon"; leave it out'
    for number, group in enumerate(recipe.optim.groups):
        at = ("optim", "groups", index(number))
        own = [key for key in ("lr", "weight_decay") if getattr(group, key) is not None]
        if group.frozen and own:
            yield (*at, own[0]), f"{dotted((*at, own[0]))} says nothing of frozen parameters; leave it or frozen out"
        if not group.frozen and not own:
            yield at, f"{dotted(at)} changes nothing; give it lr, weight_decay or frozen = true"


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
    """Yield a problem for each value of `recipe` that this version does not support, so that none is ignored."""
    values = recipe.model_dump(by_alias=True)
    checked = dict(NOT_YET)
    if recipe.eval is not None:
        changed = {name for name, value in values["eval"].items() if value != values["data"].get(name)}
        checked |= {("eval", key[1]): rule for key, rule in NOT_YET.items() if key[0] == "data" and key[1] in changed}
    for key, (supported, why) in checked.items():
        value = values[key[0]][key[1]]
        if value not in supported:
            yield key, f"{dotted(key)} = {show(value)} is not available in this version: {why}"
