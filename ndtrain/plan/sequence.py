"""Plan sequence parallelism: which parts of the blocks work on a tp rank's share of each sequence (arXiv:2205.05198).

Between the layers that tensor parallelism cuts, norms and residuals are the same on every tp rank. Under sequence
parallelism each rank computes them for its share of the tokens; modules that mix tokens or features get the whole
sequence.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Region:
    """A module inside a block that needs whole sequences, and the name `takes` of the argument that holds them.

    If only layers cut by outputs use the argument, they are `columns`, and the output of the last layer `row` is this
    rank's part of a sum over the tp ranks.
    """

    name: str
    takes: str
    columns: tuple[str, ...] = ()
    row: str | None = None


@dataclass(frozen=True)
class SequencePlan:
    """Blocks whose residual stream is cut along the sequence, and the regions in them that need whole sequences.

    Gradients of `norms` (FQNs of parameters) cover a rank's share of the tokens and are summed over tp.
    """

    blocks: tuple[str, ...]
    regions: tuple[Region, ...]
    norms: tuple[str, ...]


def decide(model: PreTrainedModel, blocks: tuple[str, ...], rules: dict[str, str]) -> SequencePlan | str:
    """Return the plan, or why the model allows none."""
    if not blocks or len({name.rpartition(".")[0] for name in blocks}) > 1:
        return "its blocks are not in one list"
    regions: list[Region] = []
    norms: list[str] = []
    for name in blocks:
        block = model.get_submodule(name)
        if own := [n for n, _ in block.named_parameters(recurse=False)]:
            return f"{name} has a parameter {own[0]} outside its modules"
        for child_name, child in block.named_children():
            fqn, params = f"{name}.{child_name}", dict(child.named_parameters())
            if fqn in rules:
                return f"tensor parallelism cuts {fqn}, which lies directly in a block"
            if "norm" in type(child).__name__.lower() and all(p.ndim == 1 for p in params.values()):
                norms += [f"{fqn}.{n}" for n in params]
            elif params:
                takes = _first(child)
                if takes is None:
                    return f"the forward of {fqn} takes no argument"
                regions.append(_region(fqn, child, rules, takes))
    return SequencePlan(blocks, tuple(regions), tuple(norms))


def _first(module: nn.Module) -> str | None:
    """Return the name of the first argument of the module's forward."""
    names = list(inspect.signature(type(module).forward).parameters)
    return names[1] if len(names) > 1 else None


def _region(fqn: str, module: nn.Module, rules: dict[str, str], takes: str) -> Region:
    whole = Region(fqn, takes)
    styles = {n: rules.get(f"{fqn}.{n}") for n, _ in module.named_children()}
    rows = [n for n, style in styles.items() if style == "rowwise"]
    columns = {n for n, style in styles.items() if style == "colwise"}
    if len(rows) != 1 or not columns or fqn in rules:
        return whole
    if not _passes(type(module).forward, takes, frozenset(columns), rows[0]):
        return whole
    return Region(fqn, takes, tuple(f"{fqn}.{n}" for n in sorted(columns)), f"{fqn}.{rows[0]}")


@cache
def _passes(forward: Callable[..., Any], takes: str, columns: frozenset[str], row: str) -> bool:
    """Return whether `forward` passes its argument `takes` only to `columns` and returns the output of `row`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == takes:
            user = parents[node]
            looks = isinstance(user, ast.Attribute) and user.attr in ("shape", "dtype", "device")
            if not looks and not (_calls(user, columns) and isinstance(user, ast.Call) and user.args == [node]):
                return False
    return _is_returned(tree, parents, row)


def _calls(node: ast.AST, names: frozenset[str]) -> bool:
    """Return whether `node` is a call of `self.NAME` for a NAME in `names`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in {f"self.{name}" for name in names}


def _is_returned(tree: ast.AST, parents: dict[ast.AST, ast.AST], name: str) -> bool:
    """Return whether the output of `self.NAME(...)` is returned unchanged, alone or in a tuple."""
    calls = [node for node in ast.walk(tree) if _calls(node, frozenset([name]))]
    if len(calls) != 1:
        return False
    user = parents[calls[0]]
    if isinstance(user, ast.Return):
        return True
    if not isinstance(user, ast.Assign) or not isinstance(user.targets[0], ast.Name):
        return False
    result, line = user.targets[0].id, user.lineno
    later = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == result and n.lineno > line]
    return bool(later) and all(
        isinstance(parents[n], ast.Return)
        or (isinstance(parents[n], ast.Tuple) and isinstance(parents[parents[n]], ast.Return))
        for n in later
    )
