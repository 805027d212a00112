"""Tell which files of a repository of data sets are a split of a subset, as `datasets` does.

A repository is one of the hub or a directory with its layout: a README.md that names subsets and their files, or files
named for their splits, such as data/train-00000-of-00002.parquet. No code of a repository is run, and nothing is read
but names and cards. A directory that `save_to_disk` wrote has a layout of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ndtrain.data.formats import name_kind
from ndtrain.errors import DamagedError, RecipeError, first_line
from ndtrain.hf.hub import CARDS
from ndtrain.storage.paths import is_local, sizes_of

# The builders of `datasets` whose files are read here too.
_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
# Settings of a builder that do not say how its files are read.
_NAMES = {"name", "version", "data_dir", "data_files", "description", "features"}
# A file's or a directory's name, without suffixes and the number of a shard -> whether it is of a held-out split.
_SPLIT = re.compile(r"([a-z]+)(?:-\d{5}-of-\d{5})?(?:\..+)?")
_HELD_OUT = {
    **dict.fromkeys(("train", "training"), False),
    **dict.fromkeys(("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"), True),
}
_SUBSETS = re.compile(r"^(configs|dataset_info):", re.MULTILINE)
_SAVED, _SPLITS = "state.json", "dataset_dict.json"


def is_saved(root: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote this directory."""
    return (root / _SPLITS).is_file() or ((root / _SAVED).is_file() and (root / "dataset_info.json").is_file())


def is_repository(root: Path) -> bool:
    """Return whether a directory has the layout of a repository: a card names subsets, or rows are of several splits.

    Those are files or directories named for a training and a held-out split.
    """
    try:
        card = (root / CARDS[0]).read_text(encoding="utf-8", errors="replace")
    except OSError:
        card = ""
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    if _SUBSETS.search(head) or any((root / name).is_file() for name in CARDS[1:]):
        return True
    rows = (name for name in names_below(root) if name_kind(Path(name)) not in (None, "text"))
    parts = (_SPLIT.fullmatch(part) for name in rows for part in PurePosixPath(name).parts)
    return len({_HELD_OUT[match[1]] for match in parts if match and match[1] in _HELD_OUT}) > 1


def names_below(root: Path) -> list[str]:
    """Return the paths below a directory of its files, sorted, without those in hidden directories."""
    if not is_local(root):
        return sorted(name for name in sizes_of(root) if not name.startswith(".") and "/." not in name)
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files]
    return sorted(names)


def saved_files(path: str, root: Path, split: str | None) -> list[Path]:
    """Return the files of a split that `save_to_disk` wrote to `root`, which the recipe calls `path`.

    Raises `RecipeError` if there is no such split, `DamagedError` if a file is missing.
    """
    if (root / _SPLITS).is_file():
        root /= _one_of(path, "split", split or "train", _json(root / _SPLITS).get("splits", []))
    elif split is not None:
        raise RecipeError(f'data.split = "{split}": data.path = "{path}" is a saved data set without splits')
    try:
        files = [root / str(file["filename"]) for file in _json(root / _SAVED)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{root / _SAVED} does not name the files of a data set") from error
    if missing := next((file for file in files if not file.is_file()), None):
        raise DamagedError(f"{root / _SAVED} names {missing.name}, which is not there")
    return files


def split_files(
    path: str, names: Sequence[str], cards: Path, *, subset: str | None, split: str | None, memo_dir: Path
) -> list[str]:
    """Return those of a repository's files, `names`, that are the split ("train" if None) of the subset.

    `cards` is a directory that holds its CARDS, `path` what the recipe calls it. The answer is kept in `memo_dir`: to
    find it takes seconds, most of them to import `datasets`. Raises `RecipeError` if there is no such subset or split,
    if its files are of a kind that is not read, and if `datasets` is not installed.
    """
    texts = {name: (cards / name).read_bytes() for name in CARDS if (cards / name).is_file()}
    asked = [subset, split, sorted(names), {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}]
    memo = memo_dir / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"
    if memo.is_file():
        return [str(name) for name in _json(memo)["files"]]
    # Empty files under the same names: all that `datasets` looks at, whatever the files hold and wherever they are.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / (Path(path).name or "repository")  # a script has the repository's name
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise DamagedError(f'data.path = "{path}" has a file called "{name}"')
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(texts.get(name, b""))
        files = _resolved(path, root, subset=subset, split=split or "train")
    memo_dir.mkdir(parents=True, exist_ok=True)
    temporary = memo.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"files": files}))
    temporary.replace(memo)
    return files


def _resolved(path: str, root: Path, *, subset: str | None, split: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"data.path = \"{path}\" is a repository of data sets, which needs a package: pip install 'ndtrain[hub]'; "
            "to read its files as they lie, give a glob of them"
        ) from error
    datasets.logging.set_verbosity_error()
    try:
        subsets = datasets.get_dataset_config_names(str(root))
        if subset is not None or len(subsets) > 1:
            own = datasets.get_dataset_default_config_name(str(root)) or "default"
            subset = _one_of(path, "subset", subset or own, subsets)
        builder = datasets.load_dataset_builder(str(root), name=subset, cache_dir=str(root.parent / "cache"))
    except RecipeError:
        raise
    except Exception as error:
        script = "; its rows are made by a script, which is never run" if list(root.glob("*.py")) else ""
        reason = first_line(error).replace(str(root), path).partition(" with any supported extension")[0]
        raise RecipeError(f'data.path = "{path}": datasets finds no data in it ({reason}){script}') from error
    config, kind = builder.config, builder.name
    if kind not in _BUILDERS:
        raise RecipeError(f'data.path = "{path}" holds data for the builder "{kind}" of datasets, which is not text')
    plain = type(config)()
    other = [key for key, value in vars(config).items() if key not in _NAMES and value != getattr(plain, key, None)]
    if other:
        raise RecipeError(
            f'data.path = "{path}": its README.md says to read the files with {", ".join(other)}, which is not done '
            "here; give the files themselves"
        )
    found: dict[str, Any] = {str(name): files for name, files in (config.data_files or {}).items()}
    files = [Path(file) for file in found[_one_of(path, "split", split, found)]]
    if out := next((file for file in files if not file.is_relative_to(root)), None):
        raise RecipeError(f'data.path = "{path}": its README.md names {out}, which is not in it')
    return [file.relative_to(root).as_posix() for file in files]


def _one_of(path: str, key: str, name: str, there: Iterable[str]) -> str:
    """Return `name` if it is one of those `there`."""
    names = list(map(str, there))
    if name not in names:
        raise RecipeError(f'data.path = "{path}" has no {key} "{name}"; set data.{key} to one of {", ".join(names)}')
    return name


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{file} cannot be read ({error})") from error
