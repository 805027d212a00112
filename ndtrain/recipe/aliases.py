"""How the peers spell keys of the recipe: accepted, with a note that names ndtrain's own spelling."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ndtrain.recipe.problems import Path, Problem, RulesBroken, dotted, show

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
    ("train", "per_device_train_batch_size"): "micro_batch_size",
    ("train", "local_batch_size"): "micro_batch_size",
    ("train", "gradient_checkpointing"): "activation_checkpointing",
    ("checkpoint", "save_steps"): "every",
    ("checkpoint", "save_total_limit"): "keep",
    ("checkpoint", "resume_from_checkpoint"): "resume",
    ("log", "logging_steps"): "every",
    ("run", "output_dir"): "dir",
}

# Values that the peers' spelling of a key has and ndtrain's has not.
VALUES: dict[tuple[str, str], list[tuple[Any, Any]]] = {
    ("train", "gradient_checkpointing"): [(True, "full"), (False, "none")],
    ("schedule", "lr_scheduler_type"): [("constant_with_warmup", "constant"), ("warmup_stable_decay", "wsd")],
    ("schedule", "lr_scheduler"): [("constant_with_warmup", "constant"), ("warmup_stable_decay", "wsd")],
}


class Meaning(NamedTuple):
    """What a key of the HF Trainer's `fsdp_config` or of accelerate's FSDP plugin says in ndtrain's words."""

    sets: Path | None  # the key that says the same; None where ndtrain does nothing else anyway
    values: tuple[tuple[Any, Any], ...]  # their value, ndtrain's
    otherwise: str  # what to do about any other value


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
        'take "TRANSFORMER_BASED_WRAP", or fsdp.mode = "manual" with the modules to wrap in [fsdp.modules]',
    ),
    "state_dict_type": Meaning(
        None,
        (("SHARDED_STATE_DICT", None),),
        'checkpoints are always sharded ("SHARDED_STATE_DICT"); `ndtrain convert` makes whole files of one',
    ),
    "version": Meaning(None, ((2, None),), "ndtrain shards with FSDP2 alone; set 2, or leave it out"),
}
WRAPPED_CLASSES = ("transformer_layer_cls_to_wrap", "transformer_cls_names_to_wrap")
# Keys that mean something in FSDP1 alone, or nothing here, and what replaces them.
REFUSED: dict[str, str] = {
    "sync_module_states": 'is of FSDP1; load.mode = "rank0" sends every rank the weights that rank 0 has read',
    "use_orig_params": "is of FSDP1; FSDP2 always keeps the original parameters: leave it out",
    "limit_all_gathers": "is of FSDP1; FSDP2 gathers at most one unit ahead: leave it out",
    "backward_prefetch": "is of FSDP1; FSDP2 always gathers the next unit while one runs backward: leave it out",
    "forward_prefetch": "is of FSDP1; FSDP2 gathers on a stream of its own, ahead of the computation: leave it out",
    "sharding_strategy": "is of FSDP1; set fsdp.reshard_after_forward = true for FULL_SHARD, false for SHARD_GRAD_OP, "
    "and mesh.dp_replicate for HYBRID_SHARD",
    "min_num_params": 'cannot be used; set fsdp.mode = "manual" and name the modules to wrap in [fsdp.modules]',
    "mixed_precision_policy": "cannot be used; set fsdp.param_dtype and fsdp.reduce_dtype",
    "ignored_modules": "cannot be used; every parameter is sharded",
    "activation_checkpointing_offload": 'cannot be used; set train.activation_checkpointing = "full"',
    "xla": "cannot be used; ndtrain runs on CUDA and CPU",
}


def canonical(document: dict[str, Any], spelled: dict[Path, Path], notes: list[str]) -> dict[str, Any]:
    """Return `document` with every alias under its canonical key, which may be in another section.

    `spelled` gets the path as written of each key that was renamed, `notes` a sentence for each. Raises `RulesBroken`
    if one key is given in two spellings, or an alias says what ndtrain cannot mean.
    """
    result: dict[str, Any] = {section: {} if isinstance(t, dict) else t for section, t in document.items()}
    written: dict[Path, tuple[Path, Any]] = {}
    problems: list[Problem] = []
    for section, table in document.items():
        for key, value in table.items() if isinstance(table, dict) else ():
            at = (section, key)
            try:
                meant = list(_meant(at, value, table))
            except RulesBroken as broken:
                problems += broken.problems
                continue
            for path, new in meant:
                if path in written:
                    before, old = written[path]
                    problems.append(
                        (
                            at,
                            f"{dotted(before)} = {show(old)} and {dotted(at)} = {show(value)} are the same key; "
                            f"keep one, {dotted(path)}",
                        )
                    )
                    continue
                written[path] = (at, value)
                if isinstance(target := result.setdefault(path[0], {}), dict):
                    target[path[1]] = new
                if path != at:
                    spelled[path] = at
            if [path for path, _ in meant] != [at]:
                said = " and ".join(f"{dotted(path)} = {show(new)}" for path, new in meant)
                as_now = f"{dotted(at)} = {show(value)} is what ndtrain does anyway"
                notes.append(f"{dotted(at)} is read as {said}" if said else as_now)
    if problems:
        raise RulesBroken(problems)
    return result


def _meant(at: Path, value: Any, table: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The canonical keys and values of what is written at `at` in the section `table`."""
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
            raise RulesBroken([(at, f"{dotted(at)} = {show(value)} cannot be used: {otherwise}")])
        # The classes to wrap say the same more closely.
        if sets is not None and not (name == "auto_wrap_policy" and _names_classes(table)):
            yield sets, means[0]
    else:
        yield at, value


def _names_classes(table: dict[str, Any]) -> bool:
    return any(key.removeprefix("fsdp_") in WRAPPED_CLASSES for key in table)


def _units_of_classes(at: Path, value: Any, table: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Units of modules of these classes, the rest in the root: what [fsdp.modules] says by the names of classes."""
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
                    f"fsdp.mode = {show(table['mode'])} and {dotted(at)} = {show(value)} contradict each other; the "
                    'units of given classes need mode = "manual"',
                )
            ]
        )
    yield ("fsdp", "modules"), {name: {} for name in names}
