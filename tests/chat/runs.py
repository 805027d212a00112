"""The texts of a row that carry loss."""

from __future__ import annotations

from itertools import pairwise

from ndtrain.data.row import Encoded
from tests.chat.tokenizers import inner_of


def runs(made: Encoded, family: str) -> list[tuple[bool, str]]:
    """The text of a row in runs of tokens that do or do not carry loss."""
    assert made.loss is not None and made.loss.dtype == bool and len(made.loss) == len(made.ids) > 1
    ids, loss = made.ids.tolist(), made.loss.tolist()
    borders = [0, *(place for place in range(1, len(ids)) if loss[place] != loss[place - 1]), len(ids)]
    return [(loss[start], inner_of(family).decode(ids[start:end])) for start, end in pairwise(borders)]


def trained(made: Encoded, family: str) -> list[str]:
    """The texts of the runs that carry loss."""
    return [text for carries, text in runs(made, family) if carries]


def shown(made: Encoded, family: str) -> str:
    """The text of a row, with what carries loss between ⟦ and ⟧."""
    return "".join(f"⟦{text}⟧" if carries else text for carries, text in runs(made, family))
