"""The sections and keys of a recipe: one frozen pydantic model per section, with strict types."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from ndtrain.recipe.base import Dtype, Section, Size, Text
from ndtrain.recipe.mesh import CpSection, EpSection, FsdpSection, LoadSection, MeshSection, TpSection

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
    attn: Text = Field("sdpa", description="Attention implementation: any name in transformers' AttentionInterface.")
    experts: Text = Field("auto", description="Experts implementation: any name in transformers' experts interface.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    config: dict[str, Any] = Field({}, description="Keys of the model's config; with name, they override its own.")

    @model_validator(mode="before")
    @classmethod
    def _type_means_random(cls, values: Any) -> Any:
        if isinstance(values, dict) and "type" in values and "init" not in values:
            return {**values, "init": "random"}
        return values


# data.format -> our names of the fields of its rows, which are those of data.columns. Prepared tokens have fixed names.
COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "chat": ("messages", "conversations", "prompt", "completion", "system", "tools", "chat_template_kwargs"),
}


class DataKeys(Section):
    """The keys of [data] that [eval] has too."""

    format: Literal["auto", "text", "chat", "tokens"] = Field(
        "auto", description='What a row of the data is; "auto" takes it from the fields of the first one.'
    )
    path: Text = Field(description="File, directory, glob, or a repository of data sets on the hub.")
    subset: Text | None = Field(
        None, description="Which subset (configuration) of a repository's data sets; needed if there are several."
    )
    split: Text | None = Field(None, description='Which split of a repository\'s data set; default "train".')
    revision: Text = Field(
        "main",
        description="Branch, tag or commit of a repository of the hub; a run records the commit, and later starts "
        "use it.",
    )
    columns: dict[str, Text] = Field(
        {}, description='The data\'s names of fields that have another, e.g. { text = "content" }.'
    )
    seq_len: Annotated[int, Field(ge=2)] = Field(description="Tokens in a sequence.")
    packing: Literal["concat", "best_fit"] | bool = Field(
        True,
        description='How documents share sequences, without ever attending to each other: "concat" cuts the stream of '
        'all documents, "best_fit" keeps each in one piece, false gives each its own; true means "best_fit" for chat, '
        'else "concat".',
    )
    too_long: Literal["cut", "drop", "error"] | None = Field(
        None,
        description='What becomes of a document longer than seq_len where packing is "best_fit" or false: "cut" into '
        'pieces of seq_len, "drop" it, or "error"; default "error" for chat, else "cut".',
    )
    special_tokens: Literal["text", "parse"] = Field(
        "text",
        description='What a document is encoded to that spells a special token, such as "<|im_start|>": "text" gives '
        'plain text, "parse" the special token, for documents that were rendered with a chat template.',
    )
    train_on: Annotated[list[Literal["system", "developer", "user", "assistant", "tool"]], Field(min_length=1)] = Field(
        ["assistant"], description="chat only: roles whose messages carry loss."
    )
    chat_template: Text | None = Field(
        None,
        description="chat only: a file with a chat template, or chatml, gemma, llama3 or zephyr; by default the "
        "tokenizer's own.",
    )
    on_control_text: Literal["error", "skip", "allow"] = Field(
        "error",
        description='chat only: what is done with a row whose text spells a special token: "error", "skip" it, or '
        '"allow" it to become that token.',
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description='What is done with a row that cannot be used: "error", or "skip" it, with a count.'
    )
    documents: Literal["auto", "rows", "eos"] = Field(
        "auto",
        description='tokens only: what a document is: "rows" of the layout, or what an end token ends ("eos"), also '
        'inside rows; "auto": rows, where the layout has them.',
    )
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] | None = Field(
        None,
        description="tokens only: dtype of files that are tokens and nothing else; by default uint16, and uint32 if "
        "the tokenizer has more than 65,536 tokens.",
    )

    def of_format(self, format: Literal["text", "chat", "tokens"]) -> Self:
        """Return the section with the format that the data has, and the defaults that depend on it."""
        chat = format == "chat"
        packing = ("best_fit" if chat else "concat") if self.packing is True else self.packing
        too_long = self.too_long or ("error" if chat else "cut")
        return self.model_copy(update={"format": format, "packing": packing, "too_long": too_long})


SHARED = tuple(DataKeys.model_fields)
# Of them, those that say what of data.path is meant; another path has its own.
OF_PATH = ("subset", "split", "revision")


class DataSection(DataKeys):
    """The training data."""

    tokenizer: Text | None = Field(
        None, description='Local directory or hub id; by default model.name. "bytes" is built in.'
    )
    shuffle: bool = Field(True, description="Shuffle samples by train.seed and epoch.")
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Processes that tokenize, on one rank of each node; 0: one per core."
    )


def _data_defaults(schema: dict[str, Any]) -> None:
    """Tell editors that the keys of [data] are optional in [eval], and that their defaults are not constants."""
    for key in set(SHARED) - {"path"}:
        schema["properties"][key].pop("default", None)
        schema["properties"][key]["description"] += " Default: as in [data]."
    schema["required"] = ["path"]


class EvalSection(DataKeys):
    """Held-out data, on which the loss is measured during the run. A key of [data] that is left out is as there."""

    model_config = ConfigDict(json_schema_extra=_data_defaults)

    every: Annotated[int, Field(ge=0)] = Field(
        default_factory=int,  # `Recipe` sets the default
        description="Steps between evaluations; 0 = only at the end. Default: checkpoint.every.",
    )
    rows: Size | None = Field(None, description="Evaluate on the first rows alone, at most so many.")
    at_start: bool = Field(False, description="Evaluate before the first step of a new run too.")
    patience: Size | None = Field(
        None, description="So many evaluations in a row without a new lowest loss end the run."
    )


class OptimSection(Section):
    """The optimizer."""

    name: Literal["adamw"] = Field("adamw", description="Optimizer.")
    lr: Annotated[float, Field(ge=0)] = Field(description="Peak learning rate.")
    betas: Betas = Field((0.9, 0.95), description="Decay of the running averages.")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Decoupled weight decay.")
    decay_norms: bool = Field(
        False, description="Decay norms, biases and all parameters of fewer than two dims too; embeddings always decay."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")


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
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none", description="Activations that are recomputed in the backward pass."
    )
    compile: bool = Field(False, description="torch.compile each block.")
    max_bad_steps: Size = Field(
        10,
        description="A step whose loss or gradient is not finite is skipped; this many in a row end the run "
        "(1 = the first one does).",
    )


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
        if type(steps) is not int:
            return values
        warmup = _warmup_steps(steps, decay if type(decay) is int else 0)
        return {**values, "schedule": {**schedule, "warmup_steps": warmup}}

    def with_steps(self, steps: int) -> Self:
        """Return the recipe of a run of `steps` steps, where `train.epochs` leaves open how many they are."""
        schedule = self.schedule
        if schedule.warmup_steps is None:
            warmup = _warmup_steps(steps, schedule.decay_steps or 0)
            schedule = schedule.model_copy(update={"warmup_steps": warmup})
        train = self.train.model_copy(update={"steps": steps})
        return self.model_copy(update={"train": train, "schedule": schedule})

    @model_validator(mode="before")
    @classmethod
    def _held_out(cls, values: Any) -> Any:
        """Fill in the keys that [eval] takes from [data], and `eval.every`."""
        own, data, checkpoint = (values.get(name) for name in ("eval", "data", "checkpoint"))
        if not isinstance(own, dict) or not isinstance(data, dict):
            return values
        alone = ("path",) if own.get("path") == data.get("path") else ("path", *OF_PATH)
        shared = {key: data[key] for key in SHARED if key in data and key not in alone}
        every = checkpoint.get("every", CheckpointSection().every) if isinstance(checkpoint, dict) else 0
        return {**values, "eval": {**shared, "every": every, **own}}

    def held_out(self) -> "Recipe":
        """Return the recipe with the data of [eval], which it must have, in file order as its [data]."""
        shared = {key: getattr(self.eval, key) for key in SHARED}
        return self.model_copy(update={"data": self.data.model_copy(update={**shared, "shuffle": False})})

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
