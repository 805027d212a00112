"""Fill the sharded model with weights: from rank 0, from each rank's own slices of the files, or initialized.

In: a parallelized model on meta. Out: the same model on the device, with every parameter and buffer set.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ndtrain.hf import extra_states
from ndtrain.hf.model import tie
from ndtrain.load.files import files_to_load, refuse_overrides, unused
from ndtrain.load.identity import base_identity
from ndtrain.load.memory import fill_with_noise, materialize, unset
from ndtrain.load.rank0 import load_rank0
from ndtrain.load.scratch import initialize
from ndtrain.load.sharded import choose_mode, load_sharded
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import broadcast_json, of_rank0, on_rank0, together
from ndtrain.runs.process import Runtime
from ndtrain.storage.headers import DTYPES
from ndtrain.storage.stored import Buffers, of_piece, read_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "base_identity",
    "fill_with_noise",
    "load_weights",
    "materialize",
    "refuse_overrides",
    "unset",
    "unused",
]


def load_weights(model: PreTrainedModel, plan: Plan, *, recipe: Recipe, runtime: Runtime) -> list[str]:
    """Fill the materialized `model` as `[model] init` and `[load] mode` say, with the same weights on every mesh.

    Returns notes for the user, on rank 0.
    """
    notes: list[str] = []
    if recipe.model.init == "random":
        initialize(model, plan, recipe=recipe, progress=runtime.watch.advance)
    elif _mode(model, recipe, notes) == "rank0":
        load_rank0(model, recipe=recipe, runtime=runtime, notes=notes)
    else:
        together(lambda: load_sharded(model, recipe, notes, progress=runtime.watch.advance))
    tie(model)
    if recipe.model.init != "random":
        _load_extra(model, recipe, notes)
    return notes


def _mode(model: PreTrainedModel, recipe: Recipe, notes: list[str]) -> str:
    """Return "sharded" or "rank0", the same on every rank: for "auto" rank 0 chooses from the headers of the files."""
    if recipe.load.mode != "auto":
        return recipe.load.mode
    mode, why = of_rank0(lambda: choose_mode(model, recipe))
    if why:
        notes.append(f'load.mode = "auto": rank 0 reads the weights and sends them, because {why}')
    return str(mode)


def _load_extra(model: PreTrainedModel, recipe: Recipe, notes: list[str]) -> None:
    """Pass the extra states that the files hold as data to their modules, the same on every rank."""
    found: dict[str, Any] = {}

    def read() -> None:
        files = files_to_load(model, recipe)
        if files.kind != "safetensors":
            return  # transformers has read the others
        for key, piece in files.pieces().items():
            if not extra_states.is_extra(key):
                continue
            name = key.removesuffix(extra_states.SUFFIX).rstrip(".")
            tensor = read_all(of_piece(piece), DTYPES[piece.dtype], buffers=Buffers()).reshape(piece.sizes)
            with suppress(TypeError):
                found[name] = extra_states.to_json(tensor) if tensor.numel() else None
            found.setdefault(name, "bytes")

    on_rank0(read)
    found = broadcast_json(found)
    modules = {name for name, _ in model.named_modules()}
    extra_states.restore(
        model, {name: state for name, state in found.items() if isinstance(state, dict) and name in modules}
    )
    if left_out := [name for name, state in found.items() if state == "bytes" or name not in modules]:
        notes.append(extra_states.left_out_note(left_out, "not read from the weights; in this run"))
