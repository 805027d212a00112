"""Replace styles of a plan by those of the recipe's `[tp.plan]` and `[ep.plan]`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ndtrain.errors import PlanError
from ndtrain.plan.names import expression_of, folded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def overridden(
    model: PreTrainedModel, own: Mapping[str, str], overrides: Mapping[str, str], *, key: str, styles: tuple[str, ...]
) -> dict[str, str]:
    """Return `own` ({FQN of a module or parameter: style}) with the styles of `overrides` ({FQN pattern: style}).

    `*` in a pattern matches any characters but a dot. A module's style applies to its parameters without a style of
    their own. Raises `PlanError` for a style that is not in `styles` and for a pattern that matches nothing.
    """
    found = dict(own)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for pattern, style in overrides.items():
        if style not in styles:
            raise PlanError(f'{key}."{pattern}" = "{style}" is not a style; use one of {", ".join(styles)}')
        expression = expression_of(pattern)
        chosen = [name for name in names if expression.fullmatch(name)]
        if not chosen:
            near = difflib.get_close_matches(pattern, {*map(folded, names)}, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PlanError(f'{key}."{pattern}" matches nothing in {model.config.model_type}{hint}')
        for name in chosen:
            found = {n: s for n, s in found.items() if n.rpartition(".")[0] != name}
            found[name] = style
    return found
