"""Record in a checkpoint what its run is made from: the resolved recipe, base weights, tokenizer and data files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ndtrain.data import contents_of, find_files
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.load import base_identity
from ndtrain.recipe import Recipe
from ndtrain.train.inputs import cache_root


def origin_of(recipe: Recipe, tokenizer: ByteTokenizer | HubTokenizer) -> dict[str, Any]:
    """Return, as JSON, the `recipe` with all defaults, and the identities of its inputs, before anything is tokenized.

    `base` identifies the base weights (None if they cannot be read), `tokenizer` the tokenizer, `files` each file of
    data.path by its name below that path, and `data` all tokens. Reads the data files whose digests are not cached.
    """
    files = find_files(recipe.data.path)
    root = Path(recipe.data.path).expanduser()
    if not root.is_dir():
        root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    contents = contents_of(files, tokenizer, cache_dir=cache_root() / "data")
    return {
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "base": base_identity(recipe),
        "tokenizer": contents.tokenizer,
        "data": contents.key,
        "files": {os.path.relpath(file, root): known for file, known in zip(files, contents.files, strict=True)},
    }
