"""Converts checkpoints to the directory that `save_pretrained` would have written, and back, in one process.

Tensors stream from file to file: memory holds one group of tensors at a time (a layer's fused experts, say), never a
whole model.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ndtrain.checkpoint import CheckpointStore, check
from ndtrain.checkpoint.manifest import check_hashes, read_manifest
from ndtrain.checkpoint.tensors import pieces_of
from ndtrain.convert.from_dcp import METADATA, foreign_tensors
from ndtrain.convert.shards import parse_size
from ndtrain.convert.stream import Progress
from ndtrain.convert.to_checkpoint import copy_beside, hub_files, write_checkpoint
from ndtrain.convert.to_hub import match, meta_model_of, write_hub
from ndtrain.errors import DamagedError, NdtrainError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.hf.beside import GENERATION
from ndtrain.hf.model import tied_keys
from ndtrain.hf.weight_names import model_tensors
from ndtrain.storage import headers
from ndtrain.storage.paths import is_local, local_copy_of, os_errors, sync
from ndtrain.storage.stored import checkpoint_tensors

DTYPES = ("float32", "bfloat16", "float16")
# Files of a checkpoint that are not copied: write_hub writes its own, or they belong to the checkpoint alone.
_OWN = ("config.json", GENERATION, "train_state.json", "manifest.json", extra_states.FILE)


def convert(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    verify: bool = False,
    config: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write `checkpoint` (a step directory, or a run directory: its newest) as Hugging Face safetensors to `out`.

    Key names, files, tied weights, config and tokenizer are as `save_pretrained` writes them; the dtype is the
    config's unless given. A DCP directory that another tool wrote converts in the same way, with the `config` (a
    file, or a directory that has the tokenizer too) of its model. A Hugging Face directory becomes a checkpoint, in
    float32, for `model.name` to start from.

    Code that comes with a model travels with it; only with `trust_remote_code` does it run, which such a model needs.

    `out` appears whole or not at all; with `verify` only after the hash of every file of the checkpoint was compared
    and every bit of `out` was read back. Returns notes for the user. Raises `RecipeError` for wrong arguments and
    `DamagedError` for an incomplete or damaged source.
    """
    size = parse_size(max_shard_size or "5GB")
    if not is_local(out):
        raise RecipeError(f"{out}: convert writes only to a local directory; give one and copy it from there")
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()
    if out == Path.cwd():
        raise RecipeError(f"{out} is the current directory, which convert cannot replace; give a directory inside it")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f'--dtype "{dtype}" must be one of {", ".join(DTYPES)}')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out} already exists and is not an empty directory; choose another")
    with _readable(checkpoint):
        hub = hub_files(checkpoint)
        to_checkpoint = hub is not None
        foreign = not to_checkpoint and (checkpoint / METADATA).is_file()
    if to_checkpoint and dtype is not None:
        raise RecipeError(
            f"--dtype does not apply to the Hugging Face directory {checkpoint}: a checkpoint's weights are float32; "
            "leave it out"
        )
    if to_checkpoint and max_shard_size is not None:
        raise RecipeError(
            f"--max-shard-size does not apply to the Hugging Face directory {checkpoint}: the file size of a "
            "checkpoint is fixed; leave it out"
        )
    if foreign and config is None:
        raise RecipeError(
            f"{checkpoint} is a DCP directory and does not describe its model; give --config with its config.json"
        )
    if config is not None and not foreign:
        raise RecipeError(f"--config is for DCP directories, and {checkpoint} is not one; leave --config {config} out")
    if config is not None and not config.exists():
        raise RecipeError(f"--config {config} does not exist (looked from {Path.cwd()})")
    if config is not None and not (config.suffix == ".json" if config.is_file() else (config / "config.json").exists()):
        raise RecipeError(f"--config {config} is no config.json, nor a directory with one; give that of the model")
    if not is_local(checkpoint) and (to_checkpoint or foreign):
        raise RecipeError(
            f"{checkpoint} is not on this machine, and only ndtrain's own checkpoints convert from a URL; copy it to a "
            "local directory first"
        )
    source = checkpoint
    if not to_checkpoint and not foreign:
        with _readable(checkpoint):
            source = _step_directory(checkpoint)
            if is_local(source) and source.resolve() in out.resolve().parents:
                raise RecipeError(f"{out} is inside the checkpoint, and would go with it; give another directory")
            manifest = check(source)
            if verify:
                files = manifest["files"]
                check_hashes(source, files, (name for name in files if name.startswith("model/")))
    part = out.with_name(f".{out.name}.part")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"{out} cannot be created: {error.strerror}; choose another directory") from error
    try:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "verify": verify, "progress": progress}
        if hub is not None:
            notes = write_checkpoint(source, hub, part, **options)
        else:
            options |= {"dtype": dtype, "max_shard_size": size}
            notes = (
                _foreign_to_hub(source, config, part, **options)
                if foreign and config
                else _to_hub(source, part, **options)
            )
        _publish(part, out)
    except OSError as error:
        raise NdtrainError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # a directory that holds `out` is not empty and stays
            for parent in made:
                parent.rmdir()
    return notes


class Written(NamedTuple):
    """What a conversion wrote: the names of its dtypes, most bytes first, and its safetensors files."""

    dtypes: tuple[str, ...]
    nbytes: int
    files: int


def written(out: Path) -> Written:
    """Return what the safetensors files of the converted directory `out` hold."""
    by_dtype: Counter[str] = Counter()
    files = sorted(out.rglob("*.safetensors"))
    for file in files:
        for entry in headers.read_header(file)[1].values():
            by_dtype[str(headers.DTYPES[entry.dtype]).removeprefix("torch.")] += entry.stop - entry.start
    return Written(tuple(dtype for dtype, _ in by_dtype.most_common()), by_dtype.total(), len(files))


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Raise what cannot be read inside as a `DamagedError` that names the checkpoint."""
    try:
        with os_errors(checkpoint):
            yield
    except OSError as error:
        raise DamagedError(f"{checkpoint} cannot be read: {error.strerror or error}") from error


def _to_hub(source: Path, part: Path, *, dtype: str | None, trust_remote_code: bool, **options: Any) -> list[str]:
    manifest = read_manifest(source)
    beside = [name for name in manifest["files"] if name.split("/")[0] not in manifest["tensors"]]
    with local_copy_of(source, beside) as near:
        model, target, notes = meta_model_of(near, dtype, trust_remote_code=trust_remote_code)
        tensors = checkpoint_tensors(pieces_of(source / "model"), source / "model")
        match(model_tensors(model), tensors, source / "model")
        notes += write_hub(tensors, model, part, dtype=target, states=extra_states.read(near), **options)
        for name in beside:
            if name not in _OWN:
                (part / name).parent.mkdir(exist_ok=True)
                shutil.copy2(near / name, part / name)
    return notes


def _foreign_to_hub(
    source: Path, config: Path, part: Path, *, dtype: str | None, trust_remote_code: bool, **options: Any
) -> list[str]:
    model, target, notes = meta_model_of(config, dtype, trust_remote_code=trust_remote_code)
    state = model_tensors(model)
    tensors, found = foreign_tensors(source, state, tied_keys(model), model.config)
    match(state, tensors, source)
    notes += found + write_hub(tensors, model, part, dtype=target, states={}, **options)
    copy_beside(config, part)
    return notes


def _publish(part: Path, out: Path) -> None:
    """Sync the complete directory `part` to disk, then rename it to `out`."""
    for file in part.rglob("*"):
        sync(file)
    sync(part)
    if out.exists():
        out.rmdir()
    part.rename(out)
    sync(out.parent)


def _step_directory(path: Path) -> Path:
    if (path / "manifest.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        found, refused = CheckpointStore(path, keep=1).newest_valid()
        if found is None:
            why = f": {refused[0][1]}" if refused else ""
            raise DamagedError(f"{path} has no complete checkpoint{why}")
        return found
    if not path.exists():
        raise RecipeError(
            f"{path} does not exist (looked from {Path.cwd()}); give a directory like RUN_DIR/checkpoints/step-00000100"
        )
    raise DamagedError(
        f"{path} is not a checkpoint: it has neither manifest.json (ndtrain), .metadata (DCP) nor config.json and "
        "model.safetensors or its index (Hugging Face)"
    )
