"""What a trainer says before its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ndtrain.data import micro_batches
from ndtrain.mesh import MeshSizes
from ndtrain.train import Trainer


@pytest.mark.parametrize(
    ("sizes", "batch", "micro", "words"),
    [
        (
            MeshSizes(1, 2),
            8,
            4,
            "8 sequences x 256 tokens = 2 batch ranks x 1 micro batch x 4 sequences; 1,000 samples",
        ),
        (MeshSizes(2, 2), 16, 2, "16 sequences x 256 tokens = 4 batch ranks x 2 micro batches x 2 sequences; "),
        (MeshSizes(), 1, 1, "1 sequence x 256 tokens = 1 batch rank x 1 micro batch x 1 sequence; "),
        (MeshSizes(1, 4), 7, 2, "= 4 batch ranks x 1 micro batch x 2 sequences, 1 of them empty; "),
        (
            MeshSizes(1, 2),
            8,
            8,
            "x 1 micro batch x 4 sequences (train.micro_batch_size = 8 is cut to a batch rank's share); ",
        ),
    ],
)
def test_the_global_batch_is_told_as_an_equation(sizes: MeshSizes, batch: int, micro: int, words: str) -> None:
    rows, steps = micro_batches(batch, sizes.batch, micro)
    run: Any = SimpleNamespace(
        sizes=sizes,
        recipe=SimpleNamespace(
            train=SimpleNamespace(global_batch_size=batch, micro_batch_size=micro), data=SimpleNamespace(seq_len=256)
        ),
        batches=SimpleNamespace(micro_steps=steps, micro_batch_size=rows, samples=range(1000)),
        plan=SimpleNamespace(model_type="llama", numel=10),
        runtime=SimpleNamespace(world_size=sizes.world_size, device=SimpleNamespace(type="cpu")),
    )
    line = Trainer._arithmetic(run)
    assert words in line
    # An equation: the sequences on both sides are equal, but for those that are empty.
    assert sizes.batch * steps * rows - batch == (int(line.split(", ")[-1].split(" of")[0]) if "empty" in line else 0)
