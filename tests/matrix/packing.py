"""Which causal LM types keep packed documents apart: one by one, all at once, and under masks.

The first is what `model.attn = "auto"` does on CPU, the second, which reads windows, soft caps and sinks from what the
model hands over, on CUDA; a kernel's work is done by plain products here.

    OMP_NUM_THREADS=1 python -m tests.matrix.packing [--table tests/matrix/PACKING.md] [TYPE ...]

Each type, tiny and in float32, takes two rows of packed documents, and each document alone: its logits and the
gradients of all weights are compared. A run of ndtrain checks the same before its first step, uses masks where its
attention by documents differs or cannot be, or where a model's masks are chunks or choose keys, and refuses what
differs under masks too.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

from ndtrain.data.batches import documents_of
from ndtrain.parallel import fused
from ndtrain.parallel.documents import AttentionByDocuments
from tests.matrix.results import CONFIGS, absent

LENGTHS = ([3, 9, 12, 8], [15, 2, 15])
ROW = sum(LENGTHS[0])


def built(kind: str, attn: str) -> Any:
    torch.manual_seed(7)
    made = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    for part in (made, *(getattr(made, name, None) for name in made.sub_configs)):
        for key, value in part.to_dict().items() if part is not None else ():
            if isinstance(value, float) and ("drop" in key or "jitter" in key):
                setattr(part, key, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(made), dtype=torch.float32, attn_implementation=attn
    )
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    return model.train()


def result(model: Any, ids: Tensor, weights: Tensor, positions: Tensor | None) -> Tensor:
    """Logits after a backward pass that adds to the gradients."""
    given = {} if positions is None else {"position_ids": positions}
    logits: Tensor = model(input_ids=ids, use_cache=False, **given).logits
    (logits * weights).sum().backward()
    return logits.detach()


def worst(model: Any, ids: Tensor, weights: Tensor, apart: AbstractContextManager[None], expected: Any) -> float:
    """The largest difference of packed rows from the documents alone, relative to the largest number."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    model.zero_grad()
    with apart:
        logits = result(model, ids, weights, positions)
    alone, gradients = expected
    found = [float((logits - alone).abs().max() / alone.abs().max())]
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, param in model.named_parameters():
        if name in gradients and param.grad is not None:
            found.append(float((param.grad - gradients[name]).abs().max()) / scale)
    return max(found)


def outcomes(kind: str) -> tuple[str, str, str, str]:
    """The attention, and what packed rows give one by one, all at once and under masks."""
    try:
        attn, model = "sdpa", built(kind, "sdpa")
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        attn, model = "eager", built(kind, "eager")
    vocab = min(int(model.get_input_embeddings().weight.shape[0]), 250)
    ids = torch.randint(3, vocab, (len(LENGTHS), ROW))
    weights = torch.randn(len(LENGTHS), ROW, 1)
    parts = []
    for row, lengths in enumerate(LENGTHS):
        bounds = list(itertools.accumulate([0, *lengths]))
        pieces = [(slice(row, row + 1), slice(a, b)) for a, b in itertools.pairwise(bounds)]
        parts.append(torch.cat([result(model, ids[at], weights[at], None)[0] for at in pieces]))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected = torch.stack(parts), gradients
    other = built(kind, attn)
    one_by_one, at_once = AttentionByDocuments(model), AttentionByDocuments(other, fused=True)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    documents = torch.from_numpy(documents_of(positions.numpy()))
    found = []
    for taken, apart in (
        (model, one_by_one.given(documents)),
        (other, at_once.given(documents)),
        (model, nullcontext()),
    ):
        try:
            with mock.patch.object(fused, "kernel_for", lambda *_: fused.by_scores):
                difference = worst(taken, ids, weights, apart, expected)
            found.append("agrees" if difference < 1e-4 else f"differs ({difference:.0e})")
        except Exception as error:  # of the model's own code
            found.append(f"cannot ({type(error).__name__})")
    return attn, *found  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=sorted(CONFIGS))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for kind in options.types:
        if absent(kind):
            continue
        try:
            row = outcomes(kind)
        except Exception as error:  # whatever a model's code raises
            row = ("-", f"cannot run ({type(error).__name__})", "-", "-")
        rows.append((kind, *row))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    agree = [sum(row[column] == "agrees" for row in rows) for column in (2, 3, 4)]
    any_way = sum("agrees" in row[2:] for row in rows)
    line = (
        f"{len(rows)} types: {agree[0]} keep documents apart one by one, {agree[1]} all at once, {agree[2]} under "
        f"masks, {any_way} one way or another."
    )
    print(line)
    if options.table is not None:
        head = f"# Packed documents\n\n{__doc__}\n\ntorch {torch.__version__}, transformers {transformers.__version__}."
        table = "| type | attention | one by one | all at once | under masks |\n|---|---|---|---|---|\n"
        text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        options.table.write_text(f"{head} {line}\n\n{table}{text}", encoding="utf-8")
    sys.exit(0)


if __name__ == "__main__":
    main()
