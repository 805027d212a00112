"""`parallelize` does exactly what the plan says, for any model, mesh and rank, on torch's fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from ndtrain import parallel
from ndtrain.console.plan import plan_report, plan_text
from ndtrain.mesh import MeshSizes, build_mesh
from ndtrain.parallel import parallelize
from ndtrain.plan import EVEN, Plan
from tests.plan_truth import compared
from tests.ranks import get_pool
from tests.test_plan import plan_for, recipe_for


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Open a process group of any size in this process, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Case(NamedTuple):
    """`sizes` are those of dp_replicate, dp_shard, cp, tp, ep."""

    kind: str
    sizes: tuple[int, ...]
    rank: int
    config: dict[str, Any] | None = None
    packing: bool = True

    @property
    def id(self) -> str:
        return f"{self.kind}-{MeshSizes(*self.sizes).describe()}-rank{self.rank}".replace(" ", "")


UNEVEN = {"vocab_size": 263, "intermediate_size": 66}
# The shapes of released models, two layers deep. Qwen3-235B-A22B has 4 key-value heads, over which tp 8 is refused.
QWEN3_235B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
MIXTRAL_8X7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 8,
}
CASES = [
    # one axis alone, the first and the last rank, dims that do not divide
    Case("llama", (1, 1), 0),
    Case("llama", (1, 2), 1, UNEVEN),
    Case("llama", (1, 7), 6, UNEVEN),
    Case("llama", (1, 1, 1, 4), 2),
    Case("gpt2", (1, 8), 7),
    Case("gpt2", (2, 512), 600),
    Case("qwen3_moe", (1, 8), 5),
    # FSDP over tp: plain, grouped queries, packed, tied, uneven, with replicas
    Case("llama", (1, 3, 1, 4), 10, UNEVEN),
    Case("llama", (2, 2, 1, 2), 6),
    Case("qwen3", (1, 2, 1, 2), 2, {"num_key_value_heads": 2}),
    Case("qwen3", (16, 16, 1, 4), 1023),
    Case("phi3", (1, 2, 1, 2), 1),
    Case("phi3", (1, 5, 1, 4), 13),
    Case("gemma3_text", (1, 32, 1, 2), 63),
    Case("gemma2", (2, 1, 1, 2), 3),
    # cp joins dp_shard
    Case("qwen3", (1, 2, 4), 5),
    Case("gemma3_text", (2, 4, 2, 2), 17),
    # experts: more and fewer than ranks that share them
    Case("qwen3_moe", (1, 2, 1, 1, 2), 1),
    Case("qwen3_moe", (1, 4, 1, 1, 4), 2),
    Case("qwen3_moe", (2, 8, 1, 2, 4), 21),
    Case("qwen3_moe", (1, 4, 2, 1, 2), 7),
    Case("mixtral", (1, 4, 1, 1, 2), 3),
    Case("mixtral", (1, 2, 1, 2), 3),
    Case("deepseek_v3", (1, 2, 1, 2), 0),
    Case("deepseek_v3", (1, 128, 1, 8, 64), 500),
    Case("gpt_oss", (1, 4, 1, 1, 4), 3, packing=False),
    # at scale
    Case("llama", (8, 16, 1, 8), 511, LLAMA_70B),
    Case("mixtral", (1, 64, 1, 1, 8), 36, MIXTRAL_8X7B),
    Case("qwen3_moe", (1, 128, 1, 8, 64), 37, QWEN3_235B),
    Case("qwen3_moe", (2, 512), 777, QWEN3_235B),
]


def check(model: torch.nn.Module, plan: Plan, rank: int) -> None:
    """Assert that `model`, parallelized on `rank`, is what `plan` says."""
    params = dict(model.named_parameters())
    assert list(params) == [p.fqn for p in plan.params]
    for planned in plan.params:
        param = params[planned.fqn]
        assert isinstance(param, DTensor), planned.fqn
        assert param.is_meta
        assert tuple(param.shape) == planned.shape
        assert param.dtype == planned.dtype == torch.float32
        assert param.placements == planned.placements, planned.fqn
        assert param.device_mesh.mesh_dim_names == planned.axes, planned.fqn
        assert tuple(param.to_local().shape) == planned.local_shape(plan.sizes, rank), planned.fqn
    assert sum(p.to_local().numel() for p in params.values()) == plan.rank_numel(rank)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert wrapped == {module for unit in plan.units for module in unit.modules} | {""}
    for alias, source in plan.tied.items():
        assert model.get_parameter(alias) is model.get_parameter(source)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_parallelize_gives_exactly_what_the_plan_says(tmp_path: Path, case: Case) -> None:
    recipe = recipe_for(tmp_path, case.kind, case.config, data={"packing": case.packing})
    sizes = MeshSizes(*case.sizes)
    model, plan = plan_for(recipe, sizes)
    with fake_world(case.rank, sizes.world_size):
        parallelize(model, plan, build_mesh(sizes, "cpu"), recipe=recipe)
        check(model, plan, case.rank)


@pytest.mark.parametrize(
    ("kind", "sizes", "sections", "names"),
    [
        ("llama", MeshSizes(1, 2), {}, ["fsdp"]),
        (
            "llama",
            MeshSizes(1, 2, 2, 2),
            {"train": {"activation_checkpointing": "full"}},
            ["sequence parallelism", "tensor parallelism", "recomputation", "context parallelism", "fsdp"],
        ),
        ("qwen3_moe", MeshSizes(1, 2, 1, 1, 2), {}, ["expert parallelism", "fsdp"]),
    ],
)
def test_inspect_prints_the_transforms_that_are_applied_in_their_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    sizes: MeshSizes,
    sections: dict[str, Any],
    names: list[str],
) -> None:
    recipe = recipe_for(tmp_path, kind, **sections)
    model, plan = plan_for(recipe, sizes)
    applied: list[str] = []

    def noted(transform: parallel.Transform) -> parallel.Transform:
        def apply(*args: Any) -> Any:
            applied.append(transform.name)
            return transform.apply(*args)

        return transform._replace(apply=apply)

    monkeypatch.setattr(parallel, "TRANSFORMS", tuple(map(noted, parallel.TRANSFORMS)))
    with fake_world(0, sizes.world_size):
        parallelize(model, plan, build_mesh(sizes, "cpu"), recipe=recipe)
    report = plan_report(plan, recipe, rank=0, ranks_per_node=8)
    assert applied == names == report["transforms"]
    assert f"transforms, in this order: {', '.join(names)}" in plan_text(plan, report, 0)


def test_the_cases_cover_every_axis_and_1024_ranks() -> None:
    """Guards the list of cases against edits that lose coverage."""
    assert len(CASES) == 30 == len({case.id for case in CASES})
    sizes = [MeshSizes(*case.sizes) for case in CASES]
    assert max(s.world_size for s in sizes) == 1024
    assert all(0 <= case.rank < s.world_size for case, s in zip(CASES, sizes, strict=True))
    for axis in ("dp_replicate", "dp_shard", "cp", "tp", "ep"):
        assert sum(getattr(s, axis) > 1 for s in sizes) >= 2, axis


@pytest.mark.parametrize(
    ("kind", "sizes", "config", "fqn", "over"),
    [
        # 128 experts over 16 x 64 ranks: along their features, since most ranks would hold none
        ("qwen3_moe", MeshSizes(1, 128, 1, 8, 64), QWEN3_235B, "mlp.experts.gate_up_proj", Shard(2)),
        ("qwen3_moe", MeshSizes(1, 1024), QWEN3_235B, "mlp.experts.down_proj", Shard(1)),
        ("qwen3_moe", MeshSizes(1, 128), QWEN3_235B, "mlp.experts.gate_up_proj", Shard(0)),
        # 64 experts of one ep rank over 2
        (
            "qwen3_moe",
            MeshSizes(1, 4, 1, 1, 2),
            QWEN3_235B,
            "mlp.experts.gate_up_proj",
            _StridedShard(0, split_factor=2),
        ),
        # 1,024 rows of keys over 2,048 ranks
        ("llama", MeshSizes(1, 2048), LLAMA_70B, "self_attn.k_proj.weight", Shard(1)),
        ("llama", MeshSizes(1, 2048), LLAMA_70B, "self_attn.q_proj.weight", Shard(0)),
        # tp has the features: the other dim
        ("mixtral", MeshSizes(1, 16, 1, 4), MIXTRAL_8X7B, "mlp.experts.gate_up_proj", Shard(2)),
        ("mixtral", MeshSizes(1, 16, 1, 4), MIXTRAL_8X7B, "mlp.experts.down_proj", Shard(1)),
    ],
)
def test_fsdp_cuts_the_dim_that_fills_the_ranks_evenly(
    tmp_path: Path, kind: str, sizes: MeshSizes, config: dict[str, Any], fqn: str, over: Any
) -> None:
    _, plan = plan_for(recipe_for(tmp_path, kind, config), sizes)
    found = {p.placements[p.axes.index("efsdp" if "efsdp" in p.axes else "fsdp")] for p in plan.params if fqn in p.fqn}
    assert found == {over}
    assert plan.imbalance <= EVEN
    assert plan.uneven() == ()


@pytest.mark.parametrize("case", ["llama, dp_shard 2 x tp 2", "qwen3_moe, dp_replicate 2 x dp_shard 2, ep 2"])
def test_inspect_prints_exactly_what_each_rank_holds(tmp_path: Path, case: str) -> None:
    ranks, parameters, otherwise = compared(case, tmp_path, get_pool(4))
    assert otherwise == [] and ranks == 4 and parameters > 20
