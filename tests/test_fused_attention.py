"""Attention within documents as one kernel: its arguments are the model's, whichever kernel takes them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from ndtrain.data.batches import documents_of
from ndtrain.errors import PlanError
from ndtrain.hf.attention_functions import take_attention
from ndtrain.hf.causal import Causal, causal_attention
from ndtrain.hf.compat import and_masks, causal_mask_function
from ndtrain.parallel import fused
from ndtrain.parallel.documents import AttentionByDocuments
from ndtrain.parallel.fused import Heads, Rows, by_flash, by_flex, by_scores, visible_blocks
from ndtrain.parallel.recompute import _contexts, _keeps
from tests import tiny

LENGTHS = ([3, 9, 12, 8], [17, 1, 14])
SIZE = sum(LENGTHS[0])
# Groups of heads, windows, soft caps, sinks, values of another size than keys.
KINDS = ("llama", "qwen3_gqa", "gemma3_text", "gemma2", "gpt_oss", "deepseek_v3", "phi3", "gpt_neox", "qwen3_moe")
LACKS_SDPA = {"gemma2": "eager", "gpt_oss": "eager"}


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What the docstring of `torch.nn.attention.varlen.varlen_attn` promises, one sequence after another."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert cu_seq_q.dtype == torch.int32 and max_q == max_k == int(cu_seq_q.diff().max())
    left, right = window_size
    assert right == 0 and int(cu_seq_q[-1]) == len(query)
    parts = []
    for first, end in zip(cu_seq_q.tolist()[:-1], cu_seq_k.tolist()[1:], strict=True):
        q, k, v = (x[first:end].transpose(0, 1)[None] for x in (query, key, value))
        places = torch.arange(end - first)
        distance = places[:, None] - places
        mask = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    options = tiny.CONFIGS.get(kind) or tiny.MATRIX[kind]
    config = transformers.AutoConfig.for_model(tiny.VARIANTS.get(kind, kind), **options)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=LACKS_SDPA.get(kind, "sdpa")
    ).float()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    return model.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_for_all_documents_gives_what_each_gives_alone(kind: str) -> None:
    model = model_of(kind)
    ids = torch.randint(3, 250, (len(LENGTHS), SIZE))
    weights = torch.randn(len(LENGTHS), SIZE, 1)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    alone = torch.zeros(len(LENGTHS), SIZE, model.config.get_text_config().vocab_size)
    for row, lengths in enumerate(LENGTHS):
        for first, end in zip(np.cumsum([0, *lengths]), np.cumsum(lengths), strict=False):
            part = model(input_ids=ids[row : row + 1, first:end], use_cache=False).logits
            (part * weights[row : row + 1, first:end]).sum().backward()
            alone[row, first:end] = part[0].detach()
    expected = gradients(model)
    by_documents = AttentionByDocuments(model, fused=True)
    documents = torch.from_numpy(documents_of(positions.numpy()))
    plain = kind not in LACKS_SDPA
    for kernel in (by_scores, by_flash) if plain else (by_scores,):
        calls = mock.Mock(side_effect=kernel)
        with (
            mock.patch.object(fused, "_varlen", lambda: varlen),
            mock.patch.object(fused, "by_scores", calls),
            by_documents.given(documents),
        ):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            (packed * weights).sum().backward()
        assert calls.call_count == model.config.get_text_config().num_hidden_layers
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        for name, found in gradients(model).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    with by_documents.given(documents[:, :0]), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    with by_documents.off(), torch.no_grad():
        torch.testing.assert_close(whole, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


SINKS = torch.tensor([-1.0, 0.0, 1.0, 2.0])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "heads", [Heads(0.3), Heads(0.3, 5), Heads(0.2, 140, 3.0), Heads(0.2, None, 2.0), Heads(0.3, 9, None, SINKS)]
)
def test_flex_attention_sees_what_all_scores_see(heads: Heads) -> None:
    torch.manual_seed(0)
    length, rows = 300, Rows([[0, 7, 129, 255], [0]])
    query, key, value = (torch.randn(2, h, length, 16) for h in (4, 2, 2))
    with torch.no_grad():
        found, expected = (f(query, key, value, rows, heads) for f in (by_flex, by_scores))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routes", [False, True])
def test_compiled_flex_attention_goes_by_the_blocks_also_where_blocks_are_recomputed(routes: bool) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    length, rows, heads = 300, Rows([[0, 7, 129, 255], [0]]), Heads(0.3, 140 if routes else None)
    query, key, value = (torch.randn(2, h, length, 16) for h in (4, 2, 2))
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    expected = by_scores(query, key, value, rows, heads)
    # Eager FlexAttention, as above, looks at each score instead.
    for around in _contexts(costly=True, routes=routes):
        with mock.patch.object(fused, "_flex", lambda device: compiled), torch.no_grad(), around:
            found = by_flex(query, key, value, rows, heads)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 260])
def test_blocks_are_those_that_a_query_sees(window: int | None) -> None:
    generator = np.random.default_rng(0)
    length = 128 * 4 + 40
    documents = np.sort(generator.integers(0, 6, (5, length)), axis=1)
    documents[4] = 0
    places = np.arange(length)
    distance = places[:, None] - places
    seen = (documents[:, :, None] == documents[:, None]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    padded = np.pad(seen, ((0, 0), (0, 88), (0, 88))).reshape(5, 5, 128, 5, 128)
    partly, wholly = visible_blocks(documents, window)
    assert ((partly | wholly) == padded.any((2, 4))).all()
    assert (wholly == padded.all((2, 4))).all()


@pytest.mark.parametrize("late", [0, 1])
def test_a_kernel_that_is_wrong_does_not_pass(late: int) -> None:
    query, key, value = (
        torch.zeros(1, heads, 1, size, dtype=torch.bfloat16) for heads, size in ((4, 24), (2, 24), (2, 12))
    )

    def of_torch(*given: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
        return varlen(*given, window_size=(window_size[0] + late, 0), **options)

    with (
        mock.patch.object(fused, "_varlen", lambda: of_torch),
        mock.patch.object(fused, "_is_ampere", lambda device: True),
        pytest.raises(PlanError, match="wrong attention") if late else nullcontext(),
    ):
        assert "variable length" in fused.prove(query, key, value, Heads(0.2, 4096))


@pytest.mark.parametrize(("kind", "found"), [("llama", Causal()), ("gemma3_text", Causal(8)), ("llama4_text", None)])
def test_masks_are_known_by_what_makes_them(kind: str, found: Causal | None) -> None:
    asked: list[Any] = []
    model = model_of(kind)
    take_attention(model, lambda *args, **kwargs: (args[1].transpose(1, 2), None), lambda **given: asked.append(given))
    model(input_ids=torch.ones(1, 64, dtype=torch.int64), use_cache=False)
    assert asked and found in [causal_attention(given) for given in asked]
    padded = {**asked[0], "attention_mask": torch.ones(1, 64, dtype=torch.bool)}
    assert causal_attention(padded) is None
    other = and_masks(causal_mask_function, lambda batch, head, query, key: query >= 0)
    assert causal_attention({**asked[0], "mask_function": other}) is None


def test_selective_recomputation_keeps_what_flash_attention_gives() -> None:
    from torch.utils.checkpoint import CheckpointPolicy

    if fused._varlen() is None:
        pytest.skip("this torch has no varlen attention that takes windows and grouped heads")
    operator = torch.ops.torch_attn._varlen_attn.default
    for costly, policy in ((True, CheckpointPolicy.MUST_SAVE), (False, CheckpointPolicy.PREFER_RECOMPUTE)):
        assert _keeps(None, operator, torch.zeros(1), costly=costly) == policy
