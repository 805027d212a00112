"""Model FLOPs per token."""

from __future__ import annotations

from ndtrain.hf.routers import expert_count
from ndtrain.plan import Plan


def flops_per_token(plan: Plan, config: object, seq_len: int) -> float:
    """Return the FLOPs per token of forward and backward: 6 N, and 6 L H Q S for causal attention.

    The formula is PaLM's (arXiv:2204.02311, appendix B), for L layers of H heads of width Q. N counts the weights that
    a token is multiplied by: all but input embeddings that are not tied to the head, and of the experts only the share
    that is active for a token.
    """
    tied = set(plan.tied.values())
    active = _active_experts(config)
    multiplied = sum(
        p.numel * (active if ".experts." in p.fqn else 1.0)
        for p in plan.params
        if not ("embed" in p.fqn or "wte" in p.fqn or "wpe" in p.fqn) or p.fqn in tied
    )
    layers = getattr(config, "num_hidden_layers", 0) or 0
    if not layers:  # nothing is known of its attention
        return 6.0 * multiplied
    # Where layers differ, transformers refuses what the config says of all of them.
    each = getattr(config, "per_layer_config", None) or [config] * layers
    return 6.0 * multiplied + 6.0 * seq_len * sum(_attention_width(each[i]) for i in range(layers))


def _attention_width(config: object) -> float:
    """Return the width of all heads of a layer together, the mean of that of keys and that of values; 0 without heads.

    It is not that of the hidden states: Qwen3's and Gemma's heads are wider, and latent attention (DeepSeek's) has
    values narrower than keys.
    """
    heads = getattr(config, "num_attention_heads", None) or 0
    if not isinstance(heads, int):
        return float(getattr(config, "hidden_size", 0) or 0)
    if (unrotated := getattr(config, "qk_nope_head_dim", None)) is not None:
        key = unrotated + getattr(config, "qk_rope_head_dim", 0)
        return heads * (key + (getattr(config, "v_head_dim", None) or key)) / 2
    width = getattr(config, "head_dim", None)
    return float(heads * width if isinstance(width, int) else (getattr(config, "hidden_size", 0) if heads else 0))


def _active_experts(config: object) -> float:
    """Return the share of the experts that is active for a token; 1 where the config does not say."""
    total = expert_count(config)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_top_k", None)
    return min(1.0, chosen / total) if total and chosen else 1.0
