"""Remember in the run directory that a proof passed, so that a restart or a resume need not prove the same again."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

import ndtrain
from ndtrain.data import micro_batches
from ndtrain.engine import Engine
from ndtrain.recipe.data import DataSection
from ndtrain.storage.paths import os_errors, replace_text

FILE = "proof.json"
# What a proof does not depend on: all other keys of a recipe are part of its identity. What names the model is there as
# the model's config and code.
_LEFT_OUT: dict[str, set[str]] = {
    "model": {"name", "type", "init", "config", "revision", "trust_remote_code"},
    "data": {*DataSection.model_fields} - {"seq_len", "packing"},
    "train": {"steps", "epochs", "seed", "max_bad_steps", "global_batch_size", "micro_batch_size"},
}
_SECTIONS_LEFT_OUT = {"eval", "load", "optim", "schedule", "checkpoint", "log", "run"}


class Record(NamedTuple):
    """What a proof found: notes for the user, and whether sequence parallelism and attention by documents are kept.

    Both are None where there is none.
    """

    notes: tuple[str, ...]
    sequence: bool | None
    documents: bool | None = None


def identity(engine: Engine) -> str:
    """Return a digest of all that a proof on noise depends on: model, mesh, recipe, code, versions.

    Ask before `Engine.cut`, which changes the classes of the model's modules.
    """
    model, recipe = engine.model, engine.recipe
    keys = {
        section: {key: value for key, value in values.items() if key not in _LEFT_OUT.get(section, ())}
        for section, values in recipe.model_dump(mode="json").items()
        if section not in _SECTIONS_LEFT_OUT
    }
    config = {**model.config.to_dict(), "_name_or_path": None}
    # A proof has one row or several, as a step's micro batches have; how many is all one to it.
    rows, _ = micro_batches(recipe.train.global_batch_size, engine.sizes.batch, recipe.train.micro_batch_size)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    versions = (torch.__version__, transformers.__version__, ndtrain.__version__)
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else engine.device.type
    code = [_digest(path) for path in (*sorted(Path(ndtrain.__file__).parent.rglob("*.py")), *_sources(model))]
    evaluates = recipe.eval is not None
    parts = (kind, config, keys, repr(engine.plan), rows > 1, evaluates, device, versions, code)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def _sources(model: nn.Module) -> list[Path]:
    """Return the files that define the classes of the model's modules, other than torch's own."""
    names = {type(module).__module__ for module in model.modules()}
    files = {getattr(sys.modules[name], "__file__", None) for name in names if name.split(".")[0] != "torch"}
    return sorted(Path(file) for file in files if file)


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recall(run_dir: Path, proved: str) -> Record | None:
    """Return what the proof of this identity found in an earlier start in `run_dir`; None if there was none."""
    try:
        with os_errors(run_dir):
            kept: Any = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        if kept["identity"] == proved:
            return Record(tuple(map(str, kept["notes"])), kept["sequence"], kept["documents"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing that can be relied on: it is proved again
    return None


def remember(run_dir: Path, proved: str, record: Record) -> None:
    """Write what a proof found that passed on all ranks."""
    text = json.dumps({"identity": proved, **record._asdict()}, indent=1)
    with os_errors(run_dir):
        replace_text(run_dir / FILE, f"{text}\n")
