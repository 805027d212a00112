"""Derive a tensor-parallel plan from a model's structure, for models without a usable plan of their own.

Every linear layer of a block can be cut by outputs if its outputs are gathered: that is correct whatever the model does
with them. Pairs of layers between which the features stay independent (the two of an MLP, the projections of attention
heads) need no gathering: the first is cut by outputs, the second by inputs, and its results are summed.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from torch import nn

from ndtrain.hf.compat import Conv1D
from ndtrain.hf.model import tied_keys
from ndtrain.plan.names import is_within
from ndtrain.plan.units import embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of layers cut by outputs, and of the layer after them that is cut by inputs.
HEADS = (("q_proj", "k_proj", "v_proj"), ("self.query", "self.key", "self.value"), ("q_lin", "k_lin", "v_lin"))
PAIRS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    *((names, ("o_proj", "out_proj", "out_lin", "output.dense")) for names in HEADS),
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("proj_up_gate", "proj_up"), ("proj_down",)),
    (("w1", "w3"), ("w2",)),
    (("fc1",), ("fc2",)),
    (("fc_in",), ("fc_out",)),
    (("lin1",), ("lin2",)),
    (("c_fc",), ("c_proj",)),
    (("dense_h_to_4h",), ("dense_4h_to_h",)),
    (("intermediate.dense",), ("output.dense",)),
)
# Sizes that do not change when a module works on a share of its heads or features.
_PER_HEAD = {"head_dim", "attention_head_size", "layer_idx", "layer_id", "num_key_value_groups", "sliding_window"}


def rules(model: PreTrainedModel, tp: int, *, blocks: tuple[str, ...], without: tuple[str, ...]) -> dict[str, str]:
    """Return {name: style} of every linear layer that `tp` ranks can cut; empty if there is none.

    The modules of `without` and their children are left out.
    """
    modules = dict(model.named_modules())
    layers = {
        name: module
        for name, module in modules.items()
        if is_linear(module)
        and (is_within(name, blocks) if blocks else any(p.isdigit() for p in name.split(".")))
        and not is_within(name, without)
        and not _weight_is_read(modules[name.rpartition(".")[0]], name.rpartition(".")[2])
    }
    found: dict[str, str] = {}
    for columns, row in _pairs(layers):
        if all(_works_on_a_share(modules, name, {*columns, row}, blocks) for name in (*columns, row)) and _divide(
            model, columns, layers, tp
        ):
            found |= dict.fromkeys(columns, _style(layers[columns[0]], "colwise"))
            found[row] = _style(layers[row], "rowwise")
    for name, layer in layers.items():
        inputs, outputs = features(layer)
        # A layer much narrower than its input (a router) is not worth the communication.
        if name not in found and min(inputs, outputs) >= tp and 8 * outputs >= inputs:
            found[name] = _style(layer, "colwise_gather_output")
    return found | _vocabulary(model, modules) if found else {}


def features(layer: nn.Module) -> tuple[int, int]:
    """Return the (inputs, outputs) of a linear layer; transformers' Conv1D has its weight transposed."""
    weight = layer.weight
    return (weight.shape[0], weight.shape[1]) if is_conv1d(layer) else (weight.shape[1], weight.shape[0])  # type: ignore[index,union-attr,return-value]


def is_conv1d(module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer whose forward also works on a share of its inputs or outputs."""
    plain = isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or not _names_a_size(module))
    return plain or is_conv1d(module)


def _style(layer: nn.Module, style: str) -> str:
    return f"conv1d_{style}" if is_conv1d(layer) else style


def _pairs(layers: dict[str, nn.Module]) -> Iterator[tuple[list[str], str]]:
    for firsts, lasts in PAIRS:
        for row in layers:
            last = next((n for n in lasts if row == n or row.endswith(f".{n}")), None)
            columns = [row[: len(row) - len(last)] + first for first in firsts] if last else []
            if (
                columns
                and all(c in layers for c in columns)
                and features(layers[columns[0]])[1] == features(layers[row])[0]
            ):
                yield columns, row


def _divide(model: PreTrainedModel, columns: list[str], layers: dict[str, nn.Module], tp: int) -> bool:
    """Return whether each rank gets whole heads; the features of an MLP need not divide evenly."""
    if not any(columns[0].endswith(names[0]) for names in HEADS):
        return True
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % tp or kv_heads % tp:
        return False
    widths = [features(layers[c])[1] for c in columns]
    return widths[0] % heads == 0 and all(w * heads == widths[0] * kv_heads for w in widths[1:])


def _works_on_a_share(modules: dict[str, nn.Module], name: str, pair: set[str], blocks: tuple[str, ...]) -> bool:
    """Return whether the parent of layer `name` reads no full size and has no other parameters between the pair."""
    parent_name = name.rpartition(".")[0]
    parent = modules[parent_name]
    if _names_a_size(parent):
        return False
    if parent_name in blocks or not any(c.startswith(f"{parent_name}.") for c in pair - {name}):
        # Norms of a block, or of a module with the last layer alone, lie before or after the pair, not between.
        return True
    own = {c.removeprefix(f"{parent_name}.") for c in pair}
    return not any(n.rpartition(".")[0] not in own for n, _ in parent.named_parameters())


def _names_a_size(module: nn.Module) -> bool:
    return any(isinstance(value, int) and value > 1 for value in _sizes_read(module))


def _sizes_read(module: nn.Module) -> Iterator[object]:
    """Yield the values of `self.NAME` and `self.config.NAME` that `module`'s methods read, except sizes of one head."""
    for names in _attributes(type(module)):  # type: ignore[arg-type]
        if names[-1] in _PER_HEAD or isinstance(getattr(type(module), names[-1], None), property):
            continue
        value: object = module
        for part in names:
            value = getattr(value, part, None)
        if not isinstance(value, bool):
            yield value


@cache
def _attributes(kind: type) -> tuple[tuple[str, ...], ...]:
    """Return (a,) and (a, b) for each `self.a` and `self.a.b` in the source of a class, except in its constructor."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return ()
    found = []
    for method in ast.walk(tree):
        if not isinstance(method, ast.FunctionDef) or method.name == "__init__":
            continue
        for node in ast.walk(method):
            names: list[str] = []
            while isinstance(node, ast.Attribute):
                names.insert(0, node.attr)
                node = node.value
            if names and isinstance(node, ast.Name) and node.id == "self":
                found.append(tuple(names[:2]))
    return tuple(found)


def _weight_is_read(parent: nn.Module, name: str) -> bool:
    """Return whether the parent reads the parameters of its layer `name` itself instead of calling the layer."""
    return any(names in ((name, "weight"), (name, "bias")) for names in _attributes(type(parent)))  # type: ignore[arg-type]


def _vocabulary(model: PreTrainedModel, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Return styles that cut a plain embedding and head by the vocabulary; {} if one is tied to an uncut module."""
    found = {}
    embed, head = (
        next((n for n, m in modules.items() if m is of), None)
        for of in (embeddings(model, "input"), embeddings(model, "output"))
    )
    if embed is not None and type(modules[embed]) is nn.Embedding:
        found[embed] = "embedding_rowwise"
    if head is not None and type(modules[head]) is nn.Linear:
        found[head] = "colwise_gather_output"
    for pair in tied_keys(model).items():
        owners = [name.rpartition(".")[0] for name in pair]
        if any(o in found for o in owners) and not all(o in found for o in owners):
            return {}
    return found
