"""Accept other tools' spellings of the recipe's keys, with a note that names ndtrain's own spelling."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ndtrain.recipe.data import SHARED
from ndtrain.recipe.problems import Key, Problem, RulesBroken, dotted, show

# (section, alias) -> key of the same section.
ALIASES: dict[tuple[str, str], str] = {
    ("mesh", "fsdp_size"): "dp_shard",
    ("mesh", "dp_shard_size"): "dp_shard",
    ("mesh", "data_parallel_shard_degree"): "dp_shard",
    ("mesh", "dp_replicate_size"): "dp_replicate",
    ("mesh", "data_parallel_replicate_degree"): "dp_replicate",
    ("mesh", "tp_size"): "tp",
    ("mesh", "tensor_parallel_degree"): "tp",
    ("mesh", "cp_size"): "cp",
    ("mesh", "context_parallel_degree"): "cp",
    ("mesh", "ep_size"): "ep",
    ("mesh", "expert_parallel_degree"): "ep",
    ("model", "model_name_or_path"): "name",
    ("model", "pretrained_model_name_or_path"): "name",
    ("model", "model_type"): "type",
    ("model", "attn_implementation"): "attn",
    ("model", "experts_implementation"): "experts",
    ("model", "torch_dtype"): "dtype",
    ("fsdp", "fsdp_reshard_after_forward"): "reshard_after_forward",
    ("fsdp", "fsdp_cpu_offload"): "cpu_offload",
    ("fsdp", "offload_params"): "cpu_offload",
    ("fsdp", "fsdp_offload_params"): "cpu_offload",
    ("data", "max_length"): "seq_len",
    ("data", "max_seq_length"): "seq_len",
    ("data", "sequence_len"): "seq_len",
    ("data", "sample_packing"): "packing",
    ("eval", "eval_steps"): "every",
    ("eval", "eval_on_start"): "at_start",
    ("eval", "early_stopping_patience"): "patience",
    ("optim", "learning_rate"): "lr",
    ("optim", "adam_eps"): "eps",
    ("optim", "adam_epsilon"): "eps",
    ("optim", "max_norm"): "max_grad_norm",
    ("schedule", "lr_scheduler_type"): "kind",
    ("schedule", "lr_scheduler"): "kind",
    ("schedule", "num_warmup_steps"): "warmup_steps",
    ("schedule", "min_lr_rate"): "min_lr_ratio",
    ("train", "max_steps"): "steps",
    ("train", "num_steps"): "steps",
    ("train", "num_train_epochs"): "epochs",
    ("train", "num_epochs"): "epochs",
    ("train", "per_device_train_batch_size"): "micro_batch_size",
    ("train", "local_batch_size"): "micro_batch_size",
    ("train", "gradient_checkpointing"): "activation_checkpointing",
    ("checkpoint", "save_steps"): "every",
    ("checkpoint", "save_total_limit"): "keep",
    ("checkpoint", "resume_from_checkpoint"): "resume",
    ("log", "logging_steps"): "every",
    ("run", "output_dir"): "dir",
}

ALIASES |= {("eval", alias): key for (section, alias), key in ALIASES.items() if section == "data" and key in SHARED}

# (section, alias) -> [(the other tool's value, ndtrain's)], where they differ.
VALUES: dict[tuple[str, str], list[tuple[Any, Any]]] = {
    ("train", "gradient_checkpointing"): [(True, "full"), (False, "none")],
    ("schedule", "lr_scheduler_type"): [("constant_with_warmup", "constant"), ("warmup_stable_decay", "wsd")],
    ("schedule", "lr_scheduler"): [("constant_with_warmup", "constant"), ("warmup_stable_decay", "wsd")],
}


class Meaning(NamedTuple):
    """Translation of a key of the HF Trainer's `fsdp_config` or of accelerate's FSDP plugin."""

    sets: Key | None  # ndtrain's key; None where ndtrain always behaves so
    values: tuple[tuple[Any, Any], ...]  # (their value, ndtrain's)
    otherwise: str  # way out for any other value


# Keys of [fsdp], with or without the prefix `fsdp_` (transformers 5.23, accelerate 1.15).
FSDP: dict[str, Meaning] = {
    "activation_checkpointing": Meaning(
        ("train", "activation_checkpointing"), ((True, "full"), (False, "none")), "it must be true or false"
    ),
    "cpu_ram_efficient_loading": Meaning(
        ("load", "mode"), ((True, "rank0"), (False, "sharded")), "it must be true or false"
    ),
    "auto_wrap_policy": Meaning(
        ("fsdp", "mode"),
        (("TRANSFORMER_BASED_WRAP", "auto"),),
        'use "TRANSFORMER_BASED_WRAP", or fsdp.mode = "manual" with the modules to wrap in [fsdp.modules]',
    ),
    "state_dict_type": Meaning(
        None,
        (("SHARDED_STATE_DICT", None),),
        'checkpoints are always sharded ("SHARDED_STATE_DICT"); `ndtrain convert` writes unsharded files',
    ),
    "version": Meaning(None, ((2, None),), "ndtrain uses FSDP2 only; set 2, or leave it out"),
}
WRAPPED_CLASSES = ("transformer_layer_cls_to_wrap", "transformer_cls_names_to_wrap")
# Refused keys -> the reason and what replaces them.
REFUSED: dict[str, str] = {
    "sync_module_states": 'applies to FSDP1 only; load.mode = "rank0" sends every rank the weights that rank 0 reads',
    "use_orig_params": "applies to FSDP1 only; FSDP2 always keeps the original parameters: leave it out",
    "limit_all_gathers": "applies to FSDP1 only; FSDP2 gathers at most one unit ahead: leave it out",
    "backward_prefetch": "applies to FSDP1 only; FSDP2 always gathers the next unit during a backward: leave it out",
    "forward_prefetch": "applies to FSDP1 only; FSDP2 gathers ahead on a separate stream: leave it out",
    "sharding_strategy": "applies to FSDP1 only; set fsdp.reshard_after_forward = true for FULL_SHARD, "
    "false for SHARD_GRAD_OP, and mesh.dp_replicate for HYBRID_SHARD",
    "min_num_params": 'is not supported; set fsdp.mode = "manual" and name the modules to wrap in [fsdp.modules]',
    "mixed_precision_policy": "is not supported; set fsdp.param_dtype and fsdp.reduce_dtype",
    "ignored_modules": "is not supported; every parameter is sharded",
    "activation_checkpointing_offload": 'is not a key of [fsdp]; set train.activation_checkpointing = "offload"',
    "xla": "is not supported; ndtrain runs on CUDA and CPU",
}


def canonical(document: dict[str, Any], spelled: dict[Key, Key], notes: list[str]) -> dict[str, Any]:
    """Return `document` with every alias under its canonical key, which may be in another section.

    For each renamed key, adds its spelling in the file to `spelled` and a sentence to `notes`. Raises `RulesBroken` if
    a key is given in two spellings, or an alias has a value that ndtrain does not support.
    """
    result: dict[str, Any] = {section: {} if isinstance(t, dict) else t for section, t in document.items()}
    written: dict[Key, tuple[Key, Any]] = {}
    problems: list[Problem] = []
    for section, table in document.items():
        for name, value in table.items() if isinstance(table, dict) else ():
            at = (section, name)
            try:
                meant = list(_meant(at, value, table))
            except RulesBroken as broken:
                problems += broken.problems
                continue
            for key, new in meant:
                if key in written:
                    before, old = written[key]
                    problems.append(
                        (
                            at,
                            f"{dotted(before)} = {show(old)} and {dotted(at)} = {show(value)} are the same key; "
                            f"keep one, {dotted(key)}",
                        )
                    )
                    continue
                written[key] = (at, value)
                if isinstance(target := result.setdefault(key[0], {}), dict):
                    target[key[1]] = new
                if key != at:
                    spelled[key] = at
            if [key for key, _ in meant] != [at]:
                settings = " and ".join(f"{dotted(key)} = {show(new)}" for key, new in meant)
                unneeded = f"{dotted(at)} = {show(value)} is not needed: ndtrain always does this"
                notes.append(f"{dotted(at)} is read as {settings}" if settings else unneeded)
    if problems:
        raise RulesBroken(problems)
    return result


def _meant(at: Key, value: Any, table: dict[str, Any]) -> Iterator[tuple[Key, Any]]:
    """Yield the canonical keys and values of the key `at`, written in the section `table`."""
    section, key = at
    name = key.removeprefix("fsdp_")
    if at in ALIASES:
        for old, new in VALUES.get((section, key), ()):
            # `is` for booleans, since 1 == True.
            value = new if value is old or (isinstance(old, str) and value == old) else value
        yield (section, ALIASES[section, key]), value
    elif section == "fsdp" and name in REFUSED:
        raise RulesBroken([(at, f"{dotted(at)} = {show(value)} {REFUSED[name]}")])
    elif section == "fsdp" and name in WRAPPED_CLASSES:
        yield from _units_of_classes(at, value, table)
    elif section == "fsdp" and name in FSDP:
        sets, values, otherwise = FSDP[name]
        given = value.upper() if isinstance(value, str) else value
        means = [new for old, new in values if given == old and type(given) is type(old)]
        if not means:
            raise RulesBroken([(at, f"{dotted(at)} = {show(value)} is not supported: {otherwise}")])
        # With classes to wrap, _units_of_classes sets the mode.
        if sets is not None and not (name == "auto_wrap_policy" and _names_classes(table)):
            yield sets, means[0]
    else:
        yield at, value


def _names_classes(table: dict[str, Any]) -> bool:
    return any(key.removeprefix("fsdp_") in WRAPPED_CLASSES for key in table)


def _units_of_classes(at: Key, value: Any, table: dict[str, Any]) -> Iterator[tuple[Key, Any]]:
    """Yield the mode and the [fsdp.modules] that make each module of the given classes a unit."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise RulesBroken([(at, f"{dotted(at)} = {show(value)} must be a class name or an array of class names")])
    if "mode" not in table:
        yield ("fsdp", "mode"), "manual"
    elif table["mode"] != "manual":
        raise RulesBroken(
            [
                (
                    at,
                    f"fsdp.mode = {show(table['mode'])} and {dotted(at)} = {show(value)} contradict each other; "
                    'wrapping given classes needs mode = "manual"',
                )
            ]
        )
    yield ("fsdp", "modules"), {name: {} for name in names}
