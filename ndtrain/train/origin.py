"""Record in a checkpoint what its run is made from: the resolved recipe, base weights, tokenizer and data files."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from ndtrain.data.cache import Progress
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.hf.tokenizer_key import packages
from ndtrain.load import base_identity
from ndtrain.recipe import Recipe
from ndtrain.storage.paths import is_local
from ndtrain.train.encoding import template_of
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
    part of, `content` the text of data.path, `files` each of its files by the name below that path (None for more than
    `MOST_FILES`), and `data` all tokens. Reads the data files whose digests are not cached; `progress(done, total)` is
    called with their bytes where they are prepared tokens. `template` is that of the chat template's text, None where
    rows are not rendered.
    """
    files, contents = data_contents(recipe, tokenizer, progress)
    places = [os.path.abspath(file) if is_local(file) else str(file) for file in files]
    root = os.path.expanduser(recipe.data.path)
    if not os.path.isdir(root):
        root = os.path.commonpath([os.path.dirname(place) for place in places])
    return {
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "base": base_identity(model, recipe),
        "tokenizer": contents.encoder,
        "packages": packages(),
        "template": template_of(recipe, tokenizer).key if recipe.data.format == "chat" else None,
        "data": contents.key,
        "content": _digest(" ".join(contents.files)),
        "files": {os.path.relpath(place, root): _digest(own) for place, own in zip(places, contents.files, strict=True)}
        if len(files) <= MOST_FILES
        else None,
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
