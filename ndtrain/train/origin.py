"""Record in a checkpoint what its run is made from: the resolved recipe, base weights, tokenizer and data files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ndtrain.data.cache import Progress
from ndtrain.data.mixture import mixed_key
from ndtrain.data.text import TextEncoder
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.hf.tokenizer_key import packages
from ndtrain.load import base_identity
from ndtrain.recipe import Recipe
from ndtrain.storage.paths import is_local
from ndtrain.train.data_files import path_of
from ndtrain.train.encoding import template_key
from ndtrain.train.inputs import data_contents

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Every checkpoint lists the files, and every rank reads the list.
MOST_FILES = 100_000


def origin_of(
    model: PreTrainedModel, recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer, progress: Progress = None
) -> dict[str, Any]:
    """Return, as JSON, the `recipe` and the identities of its inputs, before anything is tokenized.

    `base` identifies the base weights (None if they cannot be read), `tokenizer` the tokenizer, which `packages` are
    part of (jinja2 renders rows), `content` the text of the data, and `data` all tokens. `files` has each file by the
    name below data.path, or by its source's number and that name (None for more than `MOST_FILES`). `template` is that
    of the chat template's text, None where rows are not rendered. Reads the data files whose digests are not cached;
    `progress(done, total)` is called with their bytes where they are prepared tokens.
    """
    found = data_contents(recipe, tokenizer, progress)
    parts, mixed = recipe.parts(), bool(recipe.data.sources)
    names = [
        os.path.join(str(number), name) if mixed else name
        for number, (part, (files, _)) in enumerate(zip(parts, found, strict=True))
        for name in _names(path_of(part.data), files)
    ]
    template = template_key(recipe, tokenizer)
    own = [name for _, contents in found for name in contents.files]
    return {
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "base": base_identity(model, recipe),
        "tokenizer": TextEncoder(tokenizer).key if mixed else found[0][1].encoder,
        "packages": {**packages(), "jinja2": version("jinja2")} if template else packages(),
        "template": template,
        "data": mixed_key([contents.key for _, contents in found]) if mixed else found[0][1].key,
        "content": _digest(" ".join(own)),
        "files": dict(zip(names, map(_digest, own), strict=True)) if len(own) <= MOST_FILES else None,
    }


def _names(path: str, files: Sequence[Path]) -> list[str]:
    """Return the names of the files below `path`, or below the directory that all of them are in."""
    places = [os.path.abspath(file) if is_local(file) else str(file) for file in files]
    root = os.path.expanduser(path)
    if not os.path.isdir(root):
        root = os.path.commonpath([os.path.dirname(place) for place in places])
    return [os.path.relpath(place, root) for place in places]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
