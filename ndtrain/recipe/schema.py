"""The sections and keys of a recipe: one frozen pydantic model per section, with strict types."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, WithJsonSchema, model_validator

from ndtrain.recipe.base import Dtype, Section, Size, Text
from ndtrain.recipe.data import OF_SOURCE, SHARED, DataSection, EvalSection, with_shared
from ndtrain.recipe.mesh import CpSection, EpSection, FsdpSection, LoadSection, MeshSection, TpSection

_RECOMPUTE = {
    "type": "object",
    "properties": {
        "every": {"type": "integer", "minimum": 1},
        "budget": {"type": "number", "minimum": 0, "maximum": 1},
    },
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
}

Beta = Annotated[float, Field(ge=0, lt=1)]
# TOML has arrays, not tuples; strict mode would refuse them.
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class ModelSection(Section):
    """The model. Set exactly one of `name` and `type`."""

    name: Text | None = Field(
        None, description="Local directory, hub id, or an ndtrain checkpoint or run to start from."
    )
    type: Text | None = Field(None, description='To train from scratch: any model_type of transformers, e.g. "qwen3".')
    revision: Text = Field(
        "main",
        description="Branch, tag or commit of a model of the hub; a run records the commit, and later starts use it.",
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained",
        description='"random" draws the weights from train.seed, the same on every mesh; the default with type.',
    )
    dtype: Dtype = Field("float32", description="Dtype of the sharded (master) parameters.")
    attn: Text = Field(
        "auto",
        description='Attention implementation: any name in transformers\' AttentionInterface; "auto" is sdpa, or eager '
        "for a model that has none, and packed documents attend without a mask of a whole row, where that is the same.",
    )
    experts: Text = Field("auto", description="Experts implementation: any name in transformers' experts interface.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    config: dict[str, Any] = Field({}, description="Keys of the model's config; with name, they override its own.")

    @model_validator(mode="before")
    @classmethod
    def _type_means_random(cls, values: Any) -> Any:
        if isinstance(values, dict) and "type" in values and "init" not in values:
            return {**values, "init": "random"}
        return values


class OptimGroup(Section):
    """What differs for the parameters that `match` names."""

    match: Annotated[list[Text], Field(min_length=1)] = Field(
        description='FQN patterns of parameters or of modules ("*": any characters but a dot); the first group that '
        "matches a parameter has it."
    )
    lr: Annotated[float, Field(ge=0)] | None = Field(None, description="Peak learning rate; default optim.lr.")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Decoupled weight decay of all of them, norms and biases too; default as outside the group."
    )
    frozen: bool = Field(False, description="They keep their values, and have no gradient and no optimizer state.")


class OptimSection(Section):
    """The optimizer."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description='Optimizer; "muon" is for matrices of hidden layers, and AdamW beside it for the others.'
    )
    lr: Annotated[float, Field(ge=0)] = Field(description="Peak learning rate.")
    betas: Betas = Field((0.9, 0.95), description="Decay of the running averages.")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the denominator.")
    momentum: Beta | None = Field(None, description="muon: decay of the momentum, 0.95 if not given.")
    adjust_lr: Literal["match_rms_adamw", "original"] | None = Field(
        None,
        description='muon: how the size of a matrix changes its rate; "match_rms_adamw" if not given, by which lr and '
        "weight_decay are as for AdamW.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Decoupled weight decay.")
    decay_norms: bool = Field(
        False, description="Decay norms, biases and all parameters of fewer than two dims too; embeddings always decay."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")
    state_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="Dtype in which the optimizer's state is kept; bfloat16 is rounded at random, so that averages are "
        "kept.",
    )
    groups: list[OptimGroup] = Field(
        [], description="[[optim.groups]]: parameters with a learning rate or decay of their own, or frozen."
    )


class ScheduleSection(Section):
    """Learning rate over the steps."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = Field("cosine", description="Shape after the warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None,  # `Recipe` sets it where it knows the number of steps
        description="Steps of linear warm-up; default 2 % of all steps, rounded, so none in fewer than 25 steps.",
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Final learning rate divided by the peak."
    )
    decay_steps: Size | None = Field(
        None, description="wsd only: length of the decay at the end; default 10 % of all steps."
    )


class Recompute(Section):
    """Which activations are recomputed: those of one block in `every`, or as many as leave the share `budget`."""

    every: Size | None = None
    budget: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.every is None) == (self.budget is None):
            raise ValueError("one of every and budget")
        return self


class TrainSection(Section):
    """The loop."""

    steps: Size | None = Field(None, description="Optimizer steps. Set this or epochs.")
    epochs: Size | None = Field(
        None, description="Passes over the data, in place of steps; the last batch is filled from the next pass."
    )
    global_batch_size: Size = Field(32, description="Sequences per optimizer step, on every mesh.")
    micro_batch_size: Size = Field(4, description="Sequences per forward on one rank.")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        0, description="Seed of the random weights and of the sample order."
    )
    activation_checkpointing: (
        Literal["none", "full", "selective", "offload"] | Annotated[Recompute, WithJsonSchema(_RECOMPUTE)]
    ) = Field(
        "none",
        description='Activations that the backward pass recomputes: "full", all of a block; "selective", all but '
        'results of matrix products and attention; "offload", all of a block, whose input waits in host memory; '
        "{ every = n }, all of one block in n; { budget = x }, the cheapest, so that the share x of the memory is left "
        "(needs compile).",
    )
    compile: bool = Field(False, description="torch.compile each block.")
    tf32: bool = Field(
        False,
        description="CUDA: round the factors of float32 products to TF32's 10 bits, which is several times faster.",
    )
    max_bad_steps: Size = Field(
        10,
        description="A step whose loss or gradient is not finite is skipped; this many in a row end the run "
        "(1 = the first one does).",
    )

    @property
    def memory_budget(self) -> float | None:
        """The share of a block's activations that the compiler keeps, where it is to choose them."""
        wanted = self.activation_checkpointing
        return wanted.budget if isinstance(wanted, Recompute) else None


class CheckpointSection(Section):
    """Saving and resuming."""

    every: Annotated[int, Field(ge=0)] = Field(500, description="Steps between checkpoints; 0 = only at the end.")
    keep: Size = Field(2, description="How many of the newest checkpoints to keep.")
    keep_best: bool = Field(
        False,
        description="Keep the checkpoint with the lowest held-out loss too; a loss lower than all before is saved at "
        "once. The file `best` in run.dir names it.",
    )
    async_: bool = Field(
        True, alias="async", description="Write while training goes on; host memory holds a copy of this rank's part."
    )
    on_error: Literal["warn", "stop"] = Field(
        "warn",
        description='When a checkpoint cannot be written: "warn" goes on with the older ones, "stop" ends the run.',
    )
    resume: Text = Field(
        "auto", description='"auto": the newest valid one in run.dir; "never"; or the path or URL of a checkpoint.'
    )
    verify: bool = Field(False, description="On resume, check the hash of every file.")
    allow: list[Text] = Field(
        [],
        description="Keys whose change a resume lets pass though it changes what is trained or on what, "
        'e.g. ["model.name"].',
    )


class LogSection(Section):
    """Reports during training."""

    every: Size = Field(1, description="Steps between lines on the console.")
    tensorboard: bool = Field(False, description="Write TensorBoard events too.")


class RunSection(Section):
    """The run's directory and its time limits, which end a run with several ranks."""

    dir: Text = Field(description="Run directory.")
    rendezvous_timeout_s: Annotated[float, Field(gt=0)] = Field(
        1800.0, description="Seconds in which all ranks must have started and found each other."
    )
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(
        1800.0,
        description="Seconds; a part of the start that reads no data (the meshes, the checks on noise) and takes "
        "longer ends the run.",
    )
    read_timeout_s: Annotated[float, Field(gt=0)] = Field(
        1800.0, description="Seconds without progress on any rank that end tokenizing, or reading of weights."
    )
    save_timeout_s: Annotated[float, Field(gt=0)] = Field(
        1800.0, description="Seconds without progress on any rank that end the wait for a checkpoint."
    )
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(
        1800.0, description="Seconds; a forward, backward or update that takes longer ends the run."
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
    eval: EvalSection | None = None
    optim: OptimSection
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    run: RunSection

    _notes: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="before")
    @classmethod
    def _warm_up(cls, values: Any) -> Any:
        """Fill in `schedule.warmup_steps` where the number of steps is given."""
        schedule, train = values.get("schedule", {}), values.get("train")
        if not isinstance(schedule, dict) or not isinstance(train, dict) or "warmup_steps" in schedule:
            return values
        steps, decay = train.get("steps"), schedule.get("decay_steps")
        data = values.get("data")
        ends_before = isinstance(data, dict) and data.get("stop", "never") != "never"
        if type(steps) is not int or ends_before:
            return values
        warmup = _warmup_steps(steps, decay if type(decay) is int else 0)
        return {**values, "schedule": {**schedule, "warmup_steps": warmup}}

    def with_steps(self, steps: int) -> Self:
        """Return the recipe of a run of `steps` steps, where it leaves open how many they are."""
        schedule = self.schedule
        if schedule.warmup_steps is None:
            warmup = _warmup_steps(steps, schedule.decay_steps or 0)
            schedule = schedule.model_copy(update={"warmup_steps": warmup})
        train = self.train.model_copy(update={"steps": steps})
        return self.model_copy(update={"train": train, "schedule": schedule})

    @model_validator(mode="before")
    @classmethod
    def _inherited(cls, values: Any) -> Any:
        """Fill in the keys that [eval] takes from [data], `eval.every`, and what sources take from their section."""
        filled, data = dict(values), values.get("data")
        if not isinstance(data, dict):
            return values
        if isinstance(held_out := values.get("eval"), dict):
            checkpoint = values.get("checkpoint")
            every = checkpoint.get("every", CheckpointSection().every) if isinstance(checkpoint, dict) else 0
            filled["eval"] = {"every": every, **with_shared(held_out, data, SHARED)}
        for name in filled.keys() & {"data", "eval"}:
            section = filled[name]
            if isinstance(section, dict) and isinstance(sources := section.get("sources"), list):
                own = [with_shared(one, section, OF_SOURCE) if isinstance(one, dict) else one for one in sources]
                filled[name] = {**section, "sources": own}
        return filled

    def held_out(self) -> Self:
        """Return the recipe with the data of [eval], which it must have, in file order as its [data]."""
        shared = {key: getattr(self.eval, key) for key in SHARED}
        return self.model_copy(update={"data": self.data.model_copy(update={**shared, "shuffle": False, "window": ""})})

    def parts(self) -> list[Self]:
        """Return a recipe for each source of [data], with its keys as its [data], or this one where [data] has none."""
        return [
            self.model_copy(
                update={
                    "data": self.data.model_copy(
                        update={**{key: getattr(source, key) for key in OF_SOURCE}, "sources": []}
                    )
                }
            )
            for source in self.data.sources
        ] or [self]

    def with_parts(self, parts: "Sequence[Recipe]") -> Self:
        """Return the recipe whose [data], or each of its sources, has the keys of one of these, as `parts` returns."""
        if not self.data.sources:
            return self.model_copy(update={"data": parts[0].data})
        sources = [
            source.model_copy(update={key: getattr(part.data, key) for key in OF_SOURCE})
            for source, part in zip(self.data.sources, parts, strict=True)
        ]
        return self.model_copy(update={"data": self.data.model_copy(update={"sources": sources})})

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each accepted alias, to be shown once. Not part of the schema."""
        return self._notes

    def noted(self, notes: Iterable[str]) -> Self:
        """Return this recipe with these notes."""
        copy = self.model_copy()
        copy._notes = tuple(notes)
        return copy


def _warmup_steps(steps: int, decay: int) -> int:
    """Return the default warm-up, short enough for the decay that follows it."""
    return max(0, min((2 * steps + 50) // 100, steps - decay))
