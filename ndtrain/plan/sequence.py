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


def shared_inputs(model: PreTrainedModel, rules: dict[str, str], *, but: set[str]) -> tuple[Region, ...]:
    """Return the modules, except those in `but`, that pass their input to several layers cut by outputs and no further.

    The gradients of these layers for it can be summed over the ranks at once.
    """
    beside: dict[str, set[str]] = {}
    for name, style in rules.items():
        if style in ("colwise", "conv1d_colwise", "packed_colwise"):
            parent, _, leaf = name.rpartition(".")
            beside.setdefault(parent, set()).add(leaf)
    found = []
    for parent, columns in beside.items():
        module = model.get_submodule(parent)
        takes = _first(module)
        if len(columns) == 1 or parent in but or parent in rules or takes is None or "forward" in vars(module):
            continue
        if _passes(type(module).forward, takes, frozenset(columns)):
            found.append(Region(parent, takes, tuple(f"{parent}.{leaf}" for leaf in sorted(columns))))
    return tuple(found)


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
    forward = type(module).forward
    if not _passes(forward, takes, frozenset(columns)) or not _is_returned(forward, rows[0]):
        return whole
    return Region(fqn, takes, tuple(f"{fqn}.{n}" for n in sorted(columns)), f"{fqn}.{rows[0]}")


@cache
def _parsed(forward: Callable[..., Any]) -> tuple[ast.AST, dict[ast.AST, ast.AST]] | None:
    """Return the source of a method as a tree, and the parent of each of its nodes; None where there is none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree, {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


@cache
def _passes(forward: Callable[..., Any], takes: str, columns: frozenset[str]) -> bool:
    """Return whether `forward` passes its argument `takes` to all of the layers `columns`, and these get nothing else.

    It may look at its shape, dtype and device.
    """
    if (parsed := _parsed(forward)) is None:
        return False
    tree, parents = parsed
    called: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _calls(node, columns):
            if len(node.args) != 1 or not isinstance(node.args[0], ast.Name) or node.args[0].id != takes:
                return False
            called.add(ast.unparse(node.func))
        if isinstance(node, ast.Name) and node.id == takes:
            user = parents[node]
            looks = isinstance(user, ast.Attribute) and user.attr in ("shape", "dtype", "device")
            if not looks and not (_calls(user, columns) and isinstance(user, ast.Call) and user.args == [node]):
                return False
    return len(called) == len(columns)


def _calls(node: ast.AST, names: frozenset[str]) -> bool:
    """Return whether `node` is a call of `self.NAME` for a NAME in `names`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) in {f"self.{name}" for name in names}


@cache
def _is_returned(forward: Callable[..., Any], name: str) -> bool:
    """Return whether the output of `self.NAME(...)` is returned unchanged, alone or in a tuple."""
    if (parsed := _parsed(forward)) is None:
        return False
    tree, parents = parsed
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
