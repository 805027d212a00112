"""The attention FLOPs that MFU counts are those of the heads, whatever the width of the hidden states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import transformers

from ndtrain.engine.flops import flops_per_token
from ndtrain.plan import Plan
from tests import tiny


@pytest.mark.parametrize(
    ("kind", "changed", "widths"),
    [
        ("llama", {"head_dim": 16}, [64, 64]),
        ("llama", {"head_dim": 64}, [256, 256]),
        ("gpt2", {}, [64, 64]),
        # Keys of 16 + 8, values of 16, in 4 heads.
        ("deepseek_v3", {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}, [80, 80]),
        # Layers with all keys have wider heads.
        ("gemma4_text", {}, [64, 128, 64, 128]),
        ("falcon_mamba", {}, []),
    ],
)
def test_attention_is_counted_by_heads_and_their_width(kind: str, changed: dict[str, Any], widths: list[int]) -> None:
    sizes = tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changed}).get_text_config()
    without_weights = cast(Plan, SimpleNamespace(params=(), tied={}))
    assert flops_per_token(without_weights, config, 128) == 6 * 128 * sum(widths)
