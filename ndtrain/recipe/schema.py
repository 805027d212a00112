"""What a recipe may hold: one frozen pydantic model per section, types taken strictly."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from ndtrain.recipe.policies import module_policies

Dtype = Literal["float32", "bfloat16", "float16"]
Text = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# TOML has arrays, not tuples; strict mode would refuse them.
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class Section(BaseModel):
    """A frozen table of a recipe: no unknown keys, no coercion, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model, and in which dtype it is kept. Exactly one of `name` and `type` is set."""

    name: Text | None = Field(
        None, description="Local directory, hub id, or an ndtrain checkpoint or run to start from."
    )
    type: Text | None = Field(None, description='From scratch: any model_type of transformers, e.g. "qwen3".')
    init: Literal["pretrained", "random"] = Field(
        "pretrained",
        description='"random" draws the weights from train.seed, the same on every mesh; implied by type.',
    )
    dtype: Dtype = Field("float32", description="Dtype of the sharded (master) parameters.")
    attn: Text = Field("sdpa", description="Any name the AttentionInterface knows.")
    experts: Text = Field("auto", description="Any name transformers' experts interface knows.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    config: dict[str, Any] = Field({}, description="The model's config, or overrides of it.")

    @model_validator(mode="before")
    @classmethod
    def _type_means_random(cls, values: Any) -> Any:
        if isinstance(values, dict) and "type" in values and "init" not in values:
            return {**values, "init": "random"}
        return values


class MeshSection(Section):
    """Sizes of the mesh axes; world size = dp_replicate x dp_shard x cp x tp."""

    dp_replicate: Size = Field(1, description="Replicas of the sharded model.")
    dp_shard: Literal[-1] | Size = Field(-1, description="Ranks that shard parameters; -1 takes what is left.")
    cp: Size = Field(1, description="Ranks that split a sequence.")
    tp: Size = Field(1, description="Ranks that split each matrix.")
    ep: Size = Field(1, description="Ranks that split the experts; carved out of dp_shard x cp x tp.")


Policy = Literal["free_full_weight", "keep_full_weight"]
PolicyName = Literal["free_full_weight", "keep_full_weight", "cpu_offload", "mixed_precision"]


class ModulePolicy(Section):
    """What the FSDP units of one pattern do. What is left out is as [fsdp] says."""

    policy: Policy | None = Field(None, description="Free the full weights after forward, or keep them for backward.")
    cpu_offload: bool | None = Field(None, description="Keep shards in host memory.")
    mixed_precision: bool | Literal["float32", "bfloat16"] | None = Field(
        None, description="Compute dtype; true is fsdp.param_dtype, false the dtype of the master parameters."
    )


# A name or an array of names is short for a table.
_Modules = dict[str, ModulePolicy | PolicyName | list[PolicyName]]


class FsdpSection(Section):
    """How parameters are sharded over dp_shard x cp."""

    mode: Literal["auto", "manual"] = Field("auto", description='"manual" takes [fsdp.modules].')
    reshard_after_forward: bool = Field(True, description="Free full weights between forward and backward.")
    cpu_offload: bool = Field(False, description="Keep shards in host memory.")
    param_dtype: Dtype = Field("bfloat16", description="Compute dtype.")
    reduce_dtype: Dtype = Field("float32", description="Dtype in which gradients are summed.")
    modules: dict[str, ModulePolicy] = Field(
        {},
        description='FQN pattern ("*": any letters but a dot) or class name to policies; needs mode = "manual". '
        "Each matched module is a unit, the rest is the root's.",
    )

    @field_validator("modules", mode="before", json_schema_input_type=_Modules)
    @classmethod
    def _tables(cls, modules: Any) -> Any:
        return module_policies(modules) if isinstance(modules, dict) else modules


class TpSection(Section):
    """Tensor parallelism, over the model's own plan."""

    sequence_parallel: bool = Field(
        True, description="Split norms and residuals along the sequence, where the model allows."
    )
    plan: dict[str, str] = Field({}, description="FQN pattern to style.")


class EpSection(Section):
    """Expert parallelism, over the model's own plan."""

    plan: dict[str, str] = Field({}, description="FQN pattern to style.")


class CpSection(Section):
    """Context parallelism."""

    kind: Literal["auto", "ulysses", "ring"] = Field("auto", description="How attention crosses the cp axis.")


class LoadSection(Section):
    """How pretrained weights reach the shards."""

    mode: Literal["rank0", "sharded"] = Field(
        "rank0", description="rank 0 reads and sends; or each rank reads its slices."
    )


class DataSection(Section):
    """What is trained on."""

    format: Literal["text", "chat", "tokens"] = Field("text", description="Kind of the data.")
    path: Text = Field(description="File, directory, glob or hub dataset.")
    seq_len: Annotated[int, Field(ge=2)] = Field(description="Tokens in a sequence.")
    packing: bool = Field(True, description="Pack documents into sequences; they never see each other.")
    tokenizer: Text | None = Field(None, description='Default: model.name. "bytes" is built in.')
    shuffle: bool = Field(True, description="Shuffle by train.seed and epoch.")


class OptimSection(Section):
    """The optimizer."""

    name: Literal["adamw"] = Field("adamw", description="Optimizer.")
    lr: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    betas: Betas = Field((0.9, 0.95), description="Decay of the running averages.")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Decoupled weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")


class ScheduleSection(Section):
    """Learning rate over the steps."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = Field("cosine", description="Shape after the warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps of linear warm-up.")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Final lr over peak lr.")
    decay_steps: Size | None = Field(
        None, description="wsd only: length of the decay at the end; default 10 % of train.steps."
    )


class TrainSection(Section):
    """The loop."""

    steps: Size = Field(description="Optimizer steps.")
    global_batch_size: Size = Field(32, description="Sequences per optimizer step, on every mesh.")
    micro_batch_size: Size = Field(4, description="Sequences per batch rank per forward.")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(0, description="Seed of weights and order.")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none", description="What is recomputed in the backward."
    )
    compile: bool = Field(False, description="torch.compile each block.")
    max_bad_steps: Size = Field(
        10,
        description="A step whose loss or gradient is not finite is skipped; so many in a row end the run "
        "(1 = the first does).",
    )


class CheckpointSection(Section):
    """Saving and resuming."""

    every: Annotated[int, Field(ge=0)] = Field(100, description="Steps between checkpoints; 0 = only at the end.")
    keep: Size = Field(2, description="Newest checkpoints kept.")
    async_: bool = Field(
        True, alias="async", description="Write while training goes on; host memory holds a copy of this rank's part."
    )
    on_error: Literal["warn", "stop"] = Field(
        "warn", description="When a checkpoint cannot be written: go on with the older ones, or end the run."
    )
    resume: Text = Field(
        "auto", description='"auto": newest valid one in run.dir; "never"; or the path of a checkpoint.'
    )
    verify: bool = Field(False, description="On resume, check the hash of every file.")


class LogSection(Section):
    """What is reported while training."""

    every: Size = Field(1, description="Steps between lines on the console.")
    tensorboard: bool = Field(False, description="Write TensorBoard events too.")


class RunSection(Section):
    """Where the run leaves its files."""

    dir: Text = Field(description="Run directory.")
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(
        1800.0, description="A forward, backward or update that takes longer ends the run."
    )


class Recipe(Section):
    """A whole recipe, all defaults filled in. Made by `load_recipe`."""

    model: ModelSection
    mesh: MeshSection = MeshSection()
    fsdp: FsdpSection = FsdpSection()
    tp: TpSection = TpSection()
    ep: EpSection = EpSection()
    cp: CpSection = CpSection()
    load: LoadSection = LoadSection()
    data: DataSection
    optim: OptimSection
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    run: RunSection

    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about aliases that were accepted, for the user to see once. Not part of the schema."""
        return self._notes
