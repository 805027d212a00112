"""The sections that say how a model is spread over ranks: mesh, FSDP units, tensor, expert and context parallelism."""

from typing import Any, Literal

from pydantic import Field, field_validator

from ndtrain.recipe.base import Dtype, Section, Size
from ndtrain.recipe.policies import module_policies


class MeshSection(Section):
    """Sizes of the mesh axes; world size = dp_replicate x dp_shard x cp x tp."""

    dp_replicate: Size = Field(1, description="Replicas of the sharded model.")
    dp_shard: Literal[-1] | Size = Field(
        -1, description="Ranks that shard parameters; -1 uses all ranks that are left."
    )
    cp: Size = Field(1, description="Ranks that split a sequence.")
    tp: Size = Field(1, description="Ranks that split each matrix.")
    ep: Size = Field(1, description="Ranks that split the experts, among the dp_shard x cp x tp ranks.")

    @property
    def least_ranks(self) -> int:
        """The world size, with one rank on dp_shard where it is -1."""
        return self.dp_replicate * max(1, self.dp_shard) * self.cp * self.tp


Policy = Literal["free_full_weight", "keep_full_weight"]
PolicyName = Literal["free_full_weight", "keep_full_weight", "cpu_offload", "mixed_precision"]


class ModulePolicy(Section):
    """Policy of the FSDP units that one pattern matches. [fsdp] gives the defaults."""

    policy: Policy | None = Field(None, description="Free the full weights after forward, or keep them for backward.")
    cpu_offload: bool | None = Field(None, description="Keep shards in host memory.")
    mixed_precision: bool | Literal["float32", "bfloat16"] | None = Field(
        None, description="Compute dtype; true is fsdp.param_dtype, false the dtype of the master parameters."
    )


# A name or an array of names is short for a table.
_Modules = dict[str, ModulePolicy | PolicyName | list[PolicyName]]


class FsdpSection(Section):
    """How parameters are sharded over dp_shard x cp."""

    mode: Literal["auto", "manual"] = Field("auto", description='"manual" takes the units from [fsdp.modules].')
    reshard_after_forward: bool = Field(True, description="Free full weights between forward and backward.")
    cpu_offload: bool = Field(False, description="Keep shards in host memory.")
    param_dtype: Dtype = Field("bfloat16", description="Compute dtype.")
    reduce_dtype: Dtype = Field("float32", description="Dtype in which gradients are summed.")
    accumulate: Literal["auto", "sharded", "local"] = Field(
        "auto",
        description='Gradients of several micro batches: "sharded" reduces them after each, "local" adds up whole ones '
        'on every rank and reduces once; "auto" is "local" where a device has room for it.',
    )
    modules: dict[str, ModulePolicy] = Field(
        {},
        description='Policies by FQN pattern ("*": any characters but a dot) or class name; needs mode = "manual". '
        "Each matched module is a unit; the root holds the rest.",
    )

    @field_validator("modules", mode="before", json_schema_input_type=_Modules)
    @classmethod
    def _tables(cls, modules: Any) -> Any:
        return module_policies(modules) if isinstance(modules, dict) else modules


class TpSection(Section):
    """Tensor parallelism; `plan` overrides the model's own."""

    sequence_parallel: bool = Field(
        True, description="Split norms and residuals along the sequence, where the model allows it."
    )
    plan: dict[str, str] = Field({}, description="Styles by FQN pattern.")


class EpSection(Section):
    """Expert parallelism; `plan` overrides the model's own."""

    plan: dict[str, str] = Field({}, description="Styles by FQN pattern.")


class CpSection(Section):
    """Context parallelism."""

    kind: Literal["auto", "ulysses", "ring"] = Field(
        "auto", description="How attention exchanges data along the cp axis."
    )


class LoadSection(Section):
    """How pretrained weights are read."""

    mode: Literal["auto", "rank0", "sharded"] = Field(
        "auto",
        description='"sharded": each rank reads its slices of safetensors files; "rank0": rank 0 reads the weights and '
        'sends them; "auto": sharded where the files allow it.',
    )
