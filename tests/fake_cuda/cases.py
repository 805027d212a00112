"""The models, the meshes, and the recipes whose counts are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("golden.json")

_RING, _ULYSSES = {"cp": {"kind": "ring"}}, {"cp": {"kind": "ulysses"}}
_WHOLE = {"tp": {"sequence_parallel": False}}

DENSE = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2", "cohere"),
    *("granite", "glm4", "starcoder2", "smollm3"),
)
EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe")
# type -> sections that it needs
FAMILIES: dict[str, dict[str, Any]] = {kind: {} for kind in (*DENSE, *EXPERTS)}

MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp_shard2": ({"dp_shard": 2}, {}),
    "tp2": ({"tp": 2}, {}),
    "tp2-whole": ({"tp": 2}, _WHOLE),
    "cp2-ring": ({"cp": 2}, _RING),
    "cp2-ulysses": ({"cp": 2}, _ULYSSES),
    "dp_shard2-tp2": ({"dp_shard": 2, "tp": 2}, {}),
    "dp_shard2-cp2-tp2": ({"dp_shard": 2, "cp": 2, "tp": 2}, _RING),
    "dp_replicate2-dp_shard2": ({"dp_replicate": 2, "dp_shard": 2}, {}),
    "ep2": ({"dp_shard": 2, "ep": 2}, {}),
    "dp_shard2-tp2-ep4": ({"dp_shard": 2, "tp": 2, "ep": 4}, {}),
    "dp_shard2-cp2-ep4": ({"dp_shard": 2, "cp": 2, "ep": 4}, _RING),
}

# name -> type, mesh: their counts are in golden.json
RECIPES: dict[str, tuple[str, str]] = {
    "llama, dp_shard 2": ("llama", "dp_shard2"),
    "qwen3, tp 2": ("qwen3", "tp2"),
    "llama, tp 2 without sequence parallelism": ("llama", "tp2-whole"),
    "llama, cp 2, ring": ("llama", "cp2-ring"),
    "qwen3_moe, dp_shard 2, ep 2": ("qwen3_moe", "ep2"),
}


def sections(kind: str, mesh: str) -> dict[str, Any]:
    """Return the sections of the recipe of a model type on a mesh, beside `mesh`."""
    return {**FAMILIES[kind], **MESHES[mesh][1]}


def fits(kind: str, mesh: str) -> bool:
    """Return whether the cell makes sense: experts are spread only where there are some."""
    return "ep" not in MESHES[mesh][0] or kind in EXPERTS
