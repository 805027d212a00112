"""Find the directory that a name in a recipe stands for: a local one, or a snapshot in the hub's cache.

`resolve` asks the hub which commit a revision is and which files it has, `fetch` downloads files of that commit.
Nothing else asks the hub: readers take `directory_of` and see only local files. A repository holds a model or, with
`kind="dataset"`, data sets, of which the cache has only the wanted files, and so the names of all are kept beside them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from errno import ENOSPC
from pathlib import Path
from typing import Literal, NamedTuple

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

from ndtrain.errors import MENDABLE, DamagedError, NdtrainError, RecipeError, first_line
from ndtrain.hf.files import STANDARD, named_weights, weight_map_of
from ndtrain.storage.paths import replace_text

MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Weights of any framework, and what a model card shows.
_OTHER = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot", ".npz"),
    *(".pkl", ".tflite", ".mlmodel", ".index.json", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".pdf"),
    *(".zip", ".gz", ".tar", ".parquet", ".part", ".lock", ".metadata", ".npy", ".pb", ".distcp", ".onnx_data"),
)
Kind = Literal["model", "dataset"]
# What `datasets` reads beside the data: which files are which subset and split.
CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
_THREADS = 8
# More than any tokenizer's file, less than most weights.
_MOST_BYTES = 1 << 28
_TEMPLATES = "additional_chat_templates/"
_NAME = re.compile(rf"(?:{_TEMPLATES})?[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Snapshot(NamedTuple):
    """A commit of a repository on the hub, the paths of its files, and of those beside the weights or the data."""

    commit: str
    files: tuple[str, ...]
    beside: tuple[str, ...]
    note: str = ""

    @classmethod
    def of(cls, commit: str, sizes: Mapping[str, int | None], kind: Kind = "model") -> Snapshot:
        """Return the snapshot of files of these sizes (bytes, or None where the hub does not say)."""
        files = tuple(sorted(sizes))
        if kind == "dataset":
            return cls(commit, files, tuple(file for file in files if file in CARDS))
        return cls(commit, files, tuple(file for file in files if is_beside(file, sizes[file] or 0)))


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


def resolve(name: str, revision: str, *, key: str = "model.name", kind: Kind = "model") -> Snapshot:
    """Return the commit that `revision` (branch, tag or commit) of the repository `name` is now.

    If the hub cannot be reached, or no longer has the commit, the cache answers, with a note. Raises `RecipeError` if
    neither has it.
    """
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=timeout, files_metadata=True)
        files = getattr(info, "siblings", None) or ()
        return Snapshot.of(str(info.sha), {file.rfilename: file.size for file in files}, kind)
    except Exception as error:
        no_model, no_revision = isinstance(error, RepositoryNotFoundError), isinstance(error, RevisionNotFoundError)
        why = "the hub does not have it any more" if no_model or no_revision else _unreachable(error)
        cached = None if (no_model or no_revision) and not is_commit(revision) else _cached(name, revision, kind)
        if cached is not None:
            return cached._replace(note=f"{name}: {why}; using commit {cached.commit} from its cache")
        if isinstance(error, GatedRepoError):
            raise _gated(name, key, kind) from error
        what, section = ("model", "model") if kind == "model" else ("data set", "data")
        if no_revision:
            where = f"{name} on the hub ({constants.ENDPOINT})"
            text = f'{section}.revision = "{revision}": {where} has no such branch, tag or commit'
        elif no_model:
            text = (
                f'{key} = "{name}": {_missing(name)}, nor is there a {what} of that name on the hub '
                f"({constants.ENDPOINT}; a private one needs a login: hf auth login)"
            )
        else:
            text = (
                f'{key} = "{name}": {_missing(name)}, {why}, and its cache ({constants.HF_HUB_CACHE}) does not hold '
                f'revision "{revision}" of a {what} of that name'
            )
        raise RecipeError(text) from error


def fetch(name: str, commit: str, files: Iterable[str], *, key: str = "model.name", kind: Kind = "model") -> None:
    """Download those of `files` that the cache does not hold yet. Raises `RecipeError` or `NdtrainError`."""
    folder = snapshot_directory(name, commit, kind)
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return

    def download(file: str) -> None:
        try:
            hf_hub_download(name, file, repo_type=kind, revision=commit)
        except GatedRepoError as error:
            raise _gated(name, key, kind) from error
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


def snapshot_directory(name: str, commit: str, kind: Kind = "model") -> Path:
    """Return where the cache holds, or will hold, the files of a commit."""
    return _repository(name, kind) / "snapshots" / commit


def remember_files(name: str, found: Snapshot) -> None:
    """Write the names of all files of a commit of data sets into the hub's cache. Raises `NdtrainError`."""
    file = _list_of_files(name, found.commit)
    if file.exists():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(found.files))
    except OSError as error:
        raise NdtrainError(f"{name}: {_unreachable(error)}") from error


def files_of(name: str, commit: str) -> list[str]:
    """Return the names that `remember_files` wrote. Raises `DamagedError` without them."""
    file = _list_of_files(name, commit)
    try:
        return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{file} cannot be read ({error}); delete it, and start again with a connection") from error


def _list_of_files(name: str, commit: str) -> Path:
    return _repository(name, "dataset") / ".ndtrain" / f"{commit}.json"


def _repository(name: str, kind: Kind) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))


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


def _cached(name: str, revision: str, kind: Kind) -> Snapshot | None:
    """Return the snapshot that the cache holds of a revision, with its files; None without one."""
    ref = _repository(name, kind) / "refs" / revision
    try:
        commit = revision if is_commit(revision) else ref.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    if kind == "dataset":
        known = _list_of_files(name, commit).exists()
        return Snapshot.of(commit, dict.fromkeys(files_of(name, commit)), kind) if known else None
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


def _gated(name: str, key: str, kind: Kind) -> RecipeError:
    page = f"{constants.ENDPOINT}/{name if kind == 'model' else f'datasets/{name}'}"
    return RecipeError(f'{key} = "{name}" is gated: accept its terms on {page}, then log in with hf auth login')


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
