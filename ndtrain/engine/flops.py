"""Model FLOPs per token."""

from __future__ import annotations

from ndtrain.plan import Plan


def flops_per_token(plan: Plan, config: object, seq_len: int) -> float:
    """Return the FLOPs per token of forward and backward: 6 N, and 6 L H S for causal attention.

    The formula is PaLM's (arXiv:2204.02311, appendix B). N counts the weights that a token is multiplied by: all but
    input embeddings that are not tied to the head, and of the experts only the share that is active for a token.
    """
    tied = set(plan.tied.values())
    active = _active_experts(config)
    multiplied = sum(
        p.numel * (active if ".experts." in p.fqn else 1.0)
        for p in plan.params
        if not ("embed" in p.fqn or "wte" in p.fqn or "wpe" in p.fqn) or p.fqn in tied
    )
    layers = getattr(config, "num_hidden_layers", 0) or 0
    hidden = getattr(config, "hidden_size", 0) or 0
    return 6.0 * multiplied + 6.0 * layers * hidden * seq_len


def expert_count(config: object) -> int:
    """Return the number of experts in a layer by the config; 0 where it has none or does not say."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def _active_experts(config: object) -> float:
    """Return the share of the experts that is active for a token; 1 where the config does not say."""
    total = expert_count(config)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_top_k", None)
    return min(1.0, chosen / total) if total and chosen else 1.0
