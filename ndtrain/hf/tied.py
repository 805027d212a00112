"""Check that what is saved more than once is saved with the same values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ndtrain.errors import DamagedError
from ndtrain.storage.stored import Stored, same_values


def refuse_other_values(
    copies: Mapping[str, Sequence[str]],
    saved: Mapping[str, Stored],
    where: object,
    *,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Raise `DamagedError` if the saved copies of a weight differ; `copies` is {FQN: their keys in `saved`}.

    transformers does not tie weights that are saved with different values, whatever the config says; a model that was
    built with one weight would lose all copies but one. With `parts`, this rank compares one part of each.
    """
    for name, (first, *others) in copies.items():
        for key in others:
            if not same_values(saved[first], saved[key], part=part, parts=parts):
                raise DamagedError(other_values(where, first, key, name))


def other_values(where: object, first: str, second: str, name: str) -> str:
    """Return the message on two saved copies of the weight `name` that differ."""
    return (
        f"{where}: {first} and {second} are saved with different values, but the model has one weight for both, "
        f"{name}; if its config ties them, set tie_word_embeddings = false to keep both, as transformers does"
    )
