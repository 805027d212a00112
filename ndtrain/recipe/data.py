"""The sections and keys that say what a model is trained on, and evaluated on."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field

from ndtrain.recipe.base import Section, Size, Text

# data.format -> our names of the fields of its rows, which are those of data.columns. Prepared tokens have fixed names.
COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "chat": ("messages", "conversations", "prompt", "completion", "system", "tools", "chat_template_kwargs"),
}


class RowKeys(Section):
    """The keys that say where rows are and how they are read, of [data], its sources, and [eval]."""

    format: Literal["auto", "text", "chat", "tokens"] = Field(
        "auto", description='What a row of the data is; "auto" takes it from the fields of the first one.'
    )
    path: Text | None = Field(
        None, description="File, directory, glob, or a repository of data sets on the hub. Set this or sources."
    )
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


# Those that say what of data.path is meant; another path has its own.
OF_PATH = ("subset", "split", "revision")


def _inherits(section: str) -> Callable[[dict[str, Any]], None]:
    """Return what tells editors that keys of `section` are optional here, and that their defaults are not constants."""

    def change(schema: dict[str, Any]) -> None:
        for key in set(SHARED) - {"path", "sources"}:
            if key in schema["properties"]:
                schema["properties"][key].pop("default", None)
                schema["properties"][key]["description"] += f" Default: as in [{section}]."
        schema.pop("required", None)

    return change


class SourceSection(RowKeys):
    """One source of a mixture. A key of [data], or [eval], that is left out is as there."""

    model_config = ConfigDict(json_schema_extra=_inherits("data"))

    name: Text | None = Field(None, description="Its name in reports and metrics; by default its path.")
    weight: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Its share of the sequences, divided by the sum of all weights. Evaluations take whole sources.",
    )

    @property
    def label(self) -> str:
        """Its name, or else its path."""
        return self.name or self.path or ""


class DataKeys(RowKeys):
    """The keys of [data] that [eval] has too."""

    sources: list[SourceSection] = Field([], description="Sources of a mixture, in place of path.")
    seq_len: Annotated[int, Field(ge=2)] = Field(description="Tokens in a sequence.")


def window_bytes(window: str) -> int:
    """Return how many bytes `data.window` stands for, at least 1."""
    number, unit = window.rstrip("B").rstrip("kKMGTi"), window.lstrip("0123456789. ").upper()
    base = 1024 if "I" in unit else 1000
    return max(1, int(float(number) * base ** " KMGT".index(unit[:1] if unit[:1] in tuple("KMGT") else " ")))


SHARED = tuple(DataKeys.model_fields)
OF_SOURCE = tuple(RowKeys.model_fields)


class DataSection(DataKeys):
    """The training data."""

    stop: Literal["first", "all", "never"] = Field(
        "never",
        description='With sources: end the run where the "first" of them has been read once, or "all" of them at '
        "least once (train.epochs: so many times), unless train.steps ends it before. A source that is read starts "
        "again.",
    )
    tokenizer: Text | None = Field(
        None, description='Local directory or hub id; by default model.name. "bytes" is built in.'
    )
    shuffle: bool = Field(True, description="Shuffle samples by train.seed and epoch.")
    window: Annotated[str, Field(pattern=r"^((0*[1-9]\d*(\.\d+)?|0+\.\d*[1-9]\d*) ?([kKMGT]i?)?B)?$")] = Field(
        "",
        description='Prepare and shuffle the data in windows of files of this size, e.g. "2GB"; "" takes all of it at '
        "once.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Processes that tokenize, on one rank of each node; 0: one per core."
    )


class EvalSection(DataKeys):
    """Held-out data, on which the loss is measured during the run. A key of [data] that is left out is as there."""

    model_config = ConfigDict(json_schema_extra=_inherits("data"))

    every: Annotated[int, Field(ge=0)] = Field(
        default_factory=int,  # `Recipe` sets the default
        description="Steps between evaluations; 0 = only at the end. Default: checkpoint.every.",
    )
    rows: Size | None = Field(
        None, description="Evaluate on the first sequences alone, at most so many of each source."
    )
    at_start: bool = Field(False, description="Evaluate before the first step of a new run too.")
    patience: Size | None = Field(
        None, description="So many evaluations in a row without a new lowest loss end the run."
    )


def with_shared(own: dict[str, Any], section: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return the table `own` with the `keys` of the section around it, or before it, that it leaves out."""
    alone = ("path", "sources") if own.get("path") == section.get("path") else ("path", "sources", *OF_PATH)
    return {**{key: section[key] for key in keys if key in section and key not in alone}, **own}
