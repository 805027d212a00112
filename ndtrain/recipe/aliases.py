"""How the peers spell keys of the recipe: accepted, with a note that names ndtrain's own spelling."""

from typing import Any

from ndtrain.errors import RecipeError
from ndtrain.recipe.rules import Path, show

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


def canonical(document: dict[str, Any], spelled: dict[Path, Path], notes: list[str]) -> dict[str, Any]:
    """Return `document` with every alias under its canonical key.

    `spelled` gets the path as written of each key that was renamed, `notes` a sentence for each.
    Raises `RecipeError` if one key is given in two spellings.
    """
    result: dict[str, Any] = {}
    for section, table in document.items():
        if not isinstance(table, dict):
            result[section] = table
            continue
        renamed: dict[str, Any] = {}
        written: dict[str, str] = {}
        for key, value in table.items():
            name: str = ALIASES.get((section, key)) or key
            if name in renamed:
                raise RecipeError(
                    f"{section}.{written[name]} = {show(renamed[name])} and {section}.{key} = {show(value)} "
                    f"are the same key; keep one, {section}.{name}"
                )
            if name != key:
                for old, new in VALUES.get((section, key), ()):
                    # `is` for booleans, since 1 == True.
                    value = new if value is old or (isinstance(old, str) and value == old) else value
                spelled[(section, name)] = (section, key)
                notes.append(f"{section}.{key} is read as {section}.{name} = {show(value)}")
            renamed[name], written[name] = value, key
        result[section] = renamed
    return result
