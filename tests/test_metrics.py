"""What a run logs beside metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from tests.ranks import get_pool
from tests.test_train import trained


def test_tensorboard_has_what_metrics_jsonl_has(tmp_path: Path) -> None:
    corpus = tiny.write_corpus(tmp_path / "corpus")
    recipe = tiny.recipe_file(
        tmp_path / "recipe.toml",
        model={"type": "llama", "config": tiny.CONFIGS["llama"]},
        corpus=corpus,
        run_dir=tmp_path / "run",
        steps=3,
        log={"tensorboard": True},
        eval={"path": str(corpus / "00.txt"), "every": 1},
    )
    get_pool(1).run(trained, str(recipe), [])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for key in ("loss", "grad_norm", "lr", "tokens_per_second", "eval_loss", "perplexity"):
        seen = {event.step: event.value for event in events.Scalars(key)}
        assert seen.keys() == {1, 2, 3}
        for line in (line for line in lines if key in line):
            assert abs(seen[line["step"]] - line[key]) <= 1e-6 * abs(line[key]), key
