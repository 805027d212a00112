"""Make the FSDP units (modules that are gathered together), and find the head in which the loss can be computed."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ndtrain.hf.compat import GradientCheckpointingLayer, no_split_modules
from ndtrain.hf.model import kept_in_fp32
from ndtrain.plan.names import is_within
from ndtrain.plan.types import Unit
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_blocks(model: nn.Module) -> Iterator[str]:
    """Yield the names of the repeated blocks: modules that the model declares indivisible or checkpoints one by one."""
    declared = no_split_modules(model)
    found: list[str] = []
    for name, module in model.named_modules():
        listed = name.rpartition(".")[2].isdigit()
        is_block = isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in declared
        if listed and is_block and not is_within(name, found):
            found.append(name)
            yield name


def units(
    model: PreTrainedModel, blocks: tuple[str, ...], tied: dict[str, str], recipe: Recipe, *, experts: tuple[str, ...]
) -> Iterator[Unit]:
    """Yield the units in the order in which FSDP wraps them (a module before the one around it), without the root."""
    names = {module: name for name, module in model.named_modules()}
    usual = replace(root(recipe), reshard=recipe.fsdp.reshard_after_forward)
    for name in experts:
        # Routing weights keep their dtype, as they do when experts are gathered with their block.
        yield replace(usual, name=name, modules=(name,), experts=True, cast_inputs=False)
    for name in blocks:
        yield replace(usual, name=name, modules=(name,))
    embed, head = names.get(embeddings(model, "input")), names.get(embeddings(model, "output"))
    norm = _final_norm(model, blocks)
    together = {name.rpartition(".")[0] for name in {*tied, *tied.values()}}
    if together & {embed, head} and together - {embed, head}:
        embed = head = None  # tied to a third module: the root gathers all of them
    is_tied = head in together
    if embed is not None and not is_tied:
        yield replace(usual, name=embed, modules=(embed,))
    # Final norm and head are used last in forward and first in backward: freeing them between would gather them twice.
    tail = [m for m in ((embed if is_tied else None), norm, head) if m is not None]
    if tail:
        yield replace(usual, name=joined(tail), modules=tuple(tail), reshard=False)


def root(recipe: Recipe) -> Unit:
    """Return the unit of the remaining parameters. It stays gathered, since backward begins where forward ends."""
    fsdp = recipe.fsdp
    return Unit(
        "root",
        ("",),
        reshard=False,
        param_dtype=fsdp.param_dtype,
        reduce_dtype=fsdp.reduce_dtype,
        cast_inputs=fsdp.param_dtype != "float32",
        cpu_offload=fsdp.cpu_offload,
    )


def joined(modules: Sequence[str]) -> str:
    """Return the name of a unit of these modules."""
    return modules[0] if len(modules) == 1 else "+".join(m.rpartition(".")[2] for m in modules)


def with_float32(model: PreTrainedModel, unit: Unit, fqns: Sequence[str]) -> Unit:
    """Return `unit`, which has the parameters `fqns`, with those of them named that its model keeps in float32.

    Around a module that is kept whole nothing is cast: the model's own code casts where necessary.
    """
    kept = kept_in_fp32(model, getattr(torch, unit.param_dtype)) if unit.param_dtype != "float32" else None
    found = tuple(fqn for fqn in fqns if kept is not None and kept.search(fqn))
    if not found:
        return unit
    whole = any(all(fqn in found for fqn in fqns if is_within(fqn, [module])) for module in unit.modules)
    return replace(unit, in_float32=found, reduce_dtype="float32", cast_inputs=unit.cast_inputs and not whole)


def embeddings(model: PreTrainedModel, which: str) -> nn.Module | None:
    """Return the model's "input" or "output" embeddings; None if it has none."""
    try:
        return model.get_input_embeddings() if which == "input" else model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _final_norm(model: nn.Module, blocks: tuple[str, ...]) -> str | None:
    """Return the name of the norm after the list of blocks, in the module that holds the list; None without one."""
    if not blocks:
        return None
    container = blocks[-1].rpartition(".")[0]
    parent = container.rpartition(".")[0]
    after = False
    for name, child in model.get_submodule(parent).named_children():
        if after and "norm" in type(child).__name__.lower() and any(True for _ in child.parameters()):
            return f"{parent}.{name}" if parent else name
        after = after or (f"{parent}.{name}" if parent else name) == container
    return None


def plain_head(model: PreTrainedModel) -> str | None:
    """Return the name of the output head if the model's forward returns its output unchanged, else None.

    Only then can the loss be computed inside the head, chunk by chunk. A soft cap or a logit scale appears in the
    source as a second assignment to `logits`, or as more than a call in the first.
    """
    head = embeddings(model, "output")
    name = next((n for n, m in model.named_modules() if m is head), None)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or name is None or "." in name:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    tree = _drop_unset(tree, model.config.get_text_config())
    writes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        and any(isinstance(t, ast.Name) and t.id == "logits" for t in ast.walk(_target(node)))
    ]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == name]
    if len(writes) != 1 or len(calls) != 1 or not isinstance(writes[0], ast.Assign):
        return None
    value = writes[0].value
    if not (isinstance(value, ast.Call) and value.func is calls[0]):
        return None
    reads = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "logits" and isinstance(n.ctx, ast.Load)]
    return name if len(reads) <= 3 else None


def _drop_unset(tree: ast.Module, config: object) -> ast.Module:
    """Return `tree` without the bodies of `if self.config.NAME is not None` for each NAME that is None in `config`."""

    class Dropper(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST:
            match node.test:
                case ast.Compare(
                    left=ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr="config"), attr=option),
                    ops=[ast.IsNot()],
                    comparators=[ast.Constant(value=None)],
                ) if not node.orelse and getattr(config, option, 0) is None:
                    return ast.Pass()
            self.generic_visit(node)
            return node

    return Dropper().visit(tree)


def _target(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> ast.AST:
    return ast.Tuple(elts=node.targets) if isinstance(node, ast.Assign) else node.target
