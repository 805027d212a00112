"""Find the directory that a name in a recipe stands for: a local one, or a snapshot in the hub's cache.

`resolve` asks the hub which commit a revision is and which files it has, `fetch` downloads files of that commit.
Nothing else asks the hub: readers take `directory_of` and see only local files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from ndtrain.errors import MENDABLE, NdtrainError, RecipeError, first_line
from ndtrain.hf.files import STANDARD, named_weights, weight_map_of

MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Weights of any framework, and what a model card shows.
_OTHER = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".npz"),
    *(".pkl", ".tflite", ".mlmodel", ".index.json", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".pdf"),
    *(".zip", ".gz", ".tar", ".parquet", ".part", ".lock", ".metadata", ".npy", ".pb", ".distcp", ".onnx_data"),
)
_THREADS = 8
# More than any tokenizer's file, less than most weights.
_MOST_BYTES = 1 << 28
_TEMPLATES = "additional_chat_templates/"
_NAME = re.compile(rf"(?:{_TEMPLATES})?[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Snapshot(NamedTuple):
    """A commit of a model on the hub, the paths of its files, and of those beside the weights."""

    commit: str
    files: tuple[str, ...]
    beside: tuple[str, ...]
    note: str = ""

    @classmethod
    def of(cls, commit: str, sizes: Mapping[str, int | None]) -> Snapshot:
        """Return the snapshot of files of these sizes (bytes, or None where the hub does not say)."""
        files = sorted(sizes)
        return cls(commit, tuple(files), tuple(file for file in files if is_beside(file, sizes[file] or 0)))


def is_commit(revision: str) -> bool:
    """Return whether `revision` is the full hash of a commit, which never changes."""
    return _COMMIT.fullmatch(revision) is not None


def on_hub(name: str, revision: str = MAIN, *, key: str = "model.name") -> bool:
    """Return whether `name` is to be looked for on the hub; False for an existing file or directory.

    Raises `RecipeError` for the path of nothing, and for a local directory with a `revision`. `key` is the recipe's.
    """
    if Path(name).exists():
        if revision != MAIN:
            raise RecipeError(
                f'model.revision = "{revision}" is for models of the hub, but {key} = "{name}" is a local directory; '
                "leave model.revision out"
            )
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise RecipeError(f'{key} = "{name}": {_missing(name)}') from None
    return True


def resolve(name: str, revision: str, *, key: str = "model.name") -> Snapshot:
    """Return the commit that `revision` (branch, tag or commit) of the model `name` is now.

    If the hub cannot be reached, or no longer has the commit, the cache answers, with a note. Raises `RecipeError` if
    neither has it.
    """
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(name, revision=revision, timeout=timeout, files_metadata=True)
        return Snapshot.of(str(info.sha), {file.rfilename: file.size for file in info.siblings or ()})
    except Exception as error:
        no_model, no_revision = isinstance(error, RepositoryNotFoundError), isinstance(error, RevisionNotFoundError)
        why = "the hub does not have it any more" if no_model or no_revision else _unreachable(error)
        cached = None if (no_model or no_revision) and not is_commit(revision) else _cached(name, revision)
        if cached is not None:
            return cached._replace(note=f"{name}: {why}; using commit {cached.commit} from its cache")
        if isinstance(error, GatedRepoError):
            raise _gated(name, key) from error
        if no_revision:
            where = f"{name} on the hub ({constants.ENDPOINT})"
            text = f'model.revision = "{revision}": {where} has no such branch, tag or commit'
        elif no_model:
            text = (
                f'{key} = "{name}": {_missing(name)}, nor is there a model of that name on the hub '
                f"({constants.ENDPOINT}; a private one needs a login: hf auth login)"
            )
        else:
            text = (
                f'{key} = "{name}": {_missing(name)}, {why}, and its cache ({constants.HF_HUB_CACHE}) does not hold '
                f'revision "{revision}" of a model of that name'
            )
        raise RecipeError(text) from error


def fetch(name: str, commit: str, files: Iterable[str], *, key: str = "model.name") -> None:
    """Download those of `files` that the cache does not hold yet. Raises `RecipeError` or `NdtrainError`."""
    folder = snapshot_directory(name, commit)
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return

    def download(file: str) -> None:
        try:
            hf_hub_download(name, file, revision=commit)
        except GatedRepoError as error:
            raise _gated(name, key) from error
        except Exception as error:
            raise NdtrainError(
                f"{file} of {name} at commit {commit} cannot be downloaded: {_unreachable(error)}"
            ) from error

    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(download, missing))


def directory_of(name: str, revision: str = MAIN, *, key: str = "model.name") -> str:
    """Return the directory with the files of `name`: itself, or a snapshot with all but the weights.

    A commit that the cache holds is not asked for again. Raises what `on_hub`, `resolve` and `fetch` raise.
    """
    if not on_hub(name, revision, key=key):
        return name
    if not is_commit(revision) or not snapshot_directory(name, revision).is_dir():
        found = resolve(name, revision, key=key)
        revision = found.commit
        fetch(name, revision, found.beside, key=key)
    return str(snapshot_directory(name, revision))


def snapshot_directory(name: str, commit: str) -> Path:
    """Return where the cache holds, or will hold, the files of a commit."""
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots", commit)


def is_beside(path: str, size: int) -> bool:
    """Return whether a file of a model's directory, of `size` bytes, may be read beside the weights.

    Those are config, tokenizer (whose files may have any name), chat templates and code; weights, hidden files and
    other folders are not.
    """
    return _NAME.fullmatch(path) is not None and not path.lower().endswith(_OTHER) and size <= _MOST_BYTES


def weights_of(name: str, found: Snapshot, *, key: str = "model.name") -> list[str]:
    """Return the paths of the weights that `from_pretrained` reads; [] without any. Downloads their index."""
    directory = snapshot_directory(name, found.commit)
    for file in (named_weights(directory), *STANDARD):
        if file is None or file not in found.files:
            continue
        if not file.endswith(".index.json"):
            return [file]
        fetch(name, found.commit, [file], key=key)
        return [file, *sorted(set(weight_map_of(directory / file, f"{name} at commit {found.commit}").values()))]
    return []


def _cached(name: str, revision: str) -> Snapshot | None:
    """Return the snapshot that the cache holds of a revision, with its files; None without one."""
    ref = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs", revision)
    try:
        commit = revision if is_commit(revision) else ref.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    folder = snapshot_directory(name, commit)
    sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    return Snapshot.of(commit, sizes) if sizes else None


def _missing(name: str) -> str:
    """Return in words that `name` is no path, with the path that may be meant."""
    path = Path(name)
    try:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1)
    except OSError:
        near = []
    meant = f'; did you mean "{path.parent / near[0]}"?' if near else ""
    looked = "" if path.is_absolute() else f" (looked from {Path.cwd()}{meant})"
    return f"there is no such directory{looked or meant}"


def _gated(name: str, key: str) -> RecipeError:
    return RecipeError(
        f'{key} = "{name}" is gated: accept its terms on {constants.ENDPOINT}/{name}, then log in with hf auth login'
    )


def _unreachable(error: Exception) -> str:
    """Return in words why the hub did not answer, or why its cache cannot be written."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    if isinstance(cause or error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    if isinstance(error, OSError) and error.errno in (*MENDABLE, ENOSPC):
        return (
            f"its cache ({constants.HF_HUB_CACHE}) cannot be written: {error.strerror}; set HF_HOME to another folder"
        )
    return f"the hub ({constants.ENDPOINT}) cannot be reached: {first_line(cause or error)}"
