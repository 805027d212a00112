"""Promises of the recipe: an error names the key, the value, the rule and the line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli

from ndtrain.errors import RecipeError
from ndtrain.recipe import Recipe, json_schema, load_recipe, to_toml
from ndtrain.recipe.aliases import ALIASES, VALUES
from ndtrain.recipe.rules import NOT_YET

ROOT = Path(__file__).parent.parent
MINIMAL = """\
[model]
name = "org/model"
[data]
path = "data"
seq_len = 16
[optim]
lr = 1e-3
[train]
steps = 10
[run]
dir = "runs/x"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Load a recipe given as text."""

    def load(text: str = MINIMAL, *overrides: str) -> Recipe:
        path = tmp_path / "r.toml"
        path.write_bytes(text.encode())
        return load_recipe(path, overrides)

    return load


def with_line(line: str, section: str) -> str:
    """MINIMAL with `line` in `[section]`."""
    header = f"[{section}]\n"
    if header in MINIMAL:
        return MINIMAL.replace(header, header + line + "\n")
    return MINIMAL + header + line + "\n"


def test_every_key_has_its_documented_default(recipe: Any) -> None:
    r = recipe()
    assert (r.model.init, r.model.dtype, r.model.attn) == ("pretrained", "float32", "auto")
    assert (r.mesh.dp_replicate, r.mesh.dp_shard, r.mesh.cp, r.mesh.tp, r.mesh.ep) == (1, -1, 1, 1, 1)
    assert (r.fsdp.param_dtype, r.fsdp.reduce_dtype, r.fsdp.reshard_after_forward) == (
        "bfloat16",
        "float32",
        True,
    )
    assert (r.load.mode, r.data.packing, r.data.shuffle, r.data.tokenizer) == ("auto", True, True, None)
    assert (r.data.too_long, r.train.epochs) == (None, None)
    assert (r.train.global_batch_size, r.train.micro_batch_size, r.train.seed) == (32, 4, 0)
    assert (r.checkpoint.every, r.checkpoint.keep, r.checkpoint.async_) == (500, 2, True)
    assert (r.checkpoint.resume, r.schedule.kind, r.optim.max_grad_norm, r.log.every) == (
        "auto",
        "cosine",
        1.0,
        1,
    )
    assert (r.optim.decay_norms, r.schedule.warmup_steps) == (False, 0)
    assert r.notes == ()


@pytest.mark.parametrize(
    ("steps", "more", "warmup"),
    [
        (1, [], 0),
        (24, [], 0),
        (25, [], 1),
        (1000, [], 20),
        (1000, ["schedule.warmup_steps=0"], 0),
        (1000, ["schedule.kind=constant"], 20),
        (1000, ["schedule.kind=wsd", "schedule.decay_steps=990"], 10),
        (1000, ["schedule.kind=wsd", "schedule.decay_steps=1000"], 0),
    ],
)
def test_warm_up_takes_2_percent_of_the_steps_by_default(recipe: Any, steps: int, more: list[str], warmup: int) -> None:
    r = recipe(MINIMAL, f"train.steps={steps}", *more)
    assert r.schedule.warmup_steps == warmup
    assert tomli.loads(to_toml(r))["schedule"]["warmup_steps"] == warmup


EPOCHS = MINIMAL.replace("steps = 10", "epochs = 3")


def test_epochs_leave_the_schedule_open_until_the_steps_are_known(recipe: Any) -> None:
    r = recipe(EPOCHS, "schedule.kind=wsd")
    assert (r.train.steps, r.train.epochs, r.schedule.warmup_steps) == (None, 3, None)
    assert recipe(to_toml(r)) == r and "steps" not in tomli.loads(to_toml(r))["train"]
    known = r.with_steps(1000)
    assert known.train.epochs == 3
    assert known.schedule == recipe(MINIMAL, "schedule.kind=wsd", "train.steps=1000").schedule
    assert recipe(EPOCHS, "schedule.warmup_steps=7").with_steps(1000).schedule.warmup_steps == 7


@pytest.mark.parametrize(
    ("line", "text", "chat"),
    [
        ("true", ("concat", "cut"), ("best_fit", "error")),
        ('"best_fit"', ("best_fit", "cut"), ("best_fit", "error")),
        ("false", (False, "cut"), (False, "error")),
        ('false\ntoo_long = "drop"', (False, "drop"), (False, "drop")),
    ],
)
def test_packing_is_recorded_by_its_name_once_the_format_is_known(recipe: Any, line: str, text: Any, chat: Any) -> None:
    read = recipe(with_line(f"packing = {line}", "data"))
    for format, (packing, too_long) in (("text", text), ("tokens", text), ("chat", chat)):
        r = read.model_copy(update={"data": read.data.of_format(format)})
        assert (r.data.packing, r.data.too_long, r.data.format) == (packing, too_long, format)
        assert tomli.loads(to_toml(r))["data"]["packing"] == packing
        assert recipe(to_toml(r)) == r


# section, line, words that the message must contain
WRONG = [
    ("train", "stpes = 3", ['[train] has no key "stpes"', 'did you mean "steps"?']),
    ("train", "qqqq = 3", ["its keys are steps, epochs, global_batch_size"]),
    ("train", "lr = 3", ['[train] has no key "lr"', "it belongs to [optim]"]),
    ("trian", "x = 3", ["no section [trian]", "did you mean [train]?"]),
    ("zzz", "x = 3", ["no section [zzz]", "its sections are model, mesh"]),
    ("checkpoint", "async_ = false", ['[checkpoint] has no key "async_"', 'did you mean "async"?']),
    ("train", "learning = 'x'\nmicro_batch_sise = 1", ['did you mean "micro_batch_size"?']),
    (
        "train",
        "global_batch_size = '10'",
        ['train.global_batch_size = "10" must be a whole number of at least 1'],
    ),
    ("train", "global_batch_size = true", ["train.global_batch_size = true must be a whole number"]),
    ("train", "global_batch_size = 1.0", ["train.global_batch_size = 1.0 must be a whole number"]),
    ("train", "micro_batch_size = 0", ["train.micro_batch_size = 0", "at least 1"]),
    (
        "train",
        "micro_batch_size = 64",
        ["train.micro_batch_size = 64 is larger than train.global_batch_size = 32"],
    ),
    ("train", "seed = -1", ["train.seed = -1", "at least 0"]),
    ("train", "seed = 9223372036854775808", ["train.seed", "64 bits"]),
    ("train", "activation_checkpointing = true", ['one of "none", "full", "selective"']),
    ("mesh", "dp_shard = 0", ["mesh.dp_shard = 0 must be -1 or a whole number of at least 1"]),
    ("mesh", "dp_shard = -2", ["mesh.dp_shard = -2 must be -1 or"]),
    ("mesh", "tp = 0", ["mesh.tp = 0"]),
    ("mesh", "tp = [2]", ["mesh.tp = [2]"]),
    ("optim", "eps = 0", ["optim.eps = 0 must be a number above 0"]),
    ("optim", "eps = nan", ["optim.eps = nan must be a finite number"]),
    ("optim", "weight_decay = inf", ["optim.weight_decay = inf must be a finite number"]),
    ("optim", "weight_decay = -0.1", ["optim.weight_decay = -0.1", "at least 0"]),
    ("optim", "betas = [0.9, 1.0]", ["optim.betas = [0.9, 1.0]", "below 1"]),
    ("optim", "betas = [0.9]", ["optim.betas = [0.9] must be an array of 2"]),
    ("optim", "betas = 0.9", ["optim.betas = 0.9"]),
    ("optim", "max_grad_norm = 0", ["optim.max_grad_norm = 0"]),
    ("optim", "name = 'sgd'", ['optim.name = "sgd" must be one of "adamw", "muon"']),
    ("schedule", "kind = 'cosin'", ['schedule.kind = "cosin"', '"constant", "linear", "cosine", "wsd"']),
    ("schedule", "warmup_steps = 10", ["schedule.warmup_steps = 10 must be less than train.steps = 10"]),
    ("schedule", "warmup_steps = -1", ["schedule.warmup_steps = -1"]),
    ("schedule", "min_lr_ratio = 1.5", ["schedule.min_lr_ratio = 1.5", "at least 0 and at most 1"]),
    ("schedule", "kind = 'constant'\nmin_lr_ratio = 0.5", ["schedule.min_lr_ratio = 0.5", 'kind = "constant"']),
    ("schedule", "decay_steps = 3", ["schedule.decay_steps = 3", 'kind = "wsd"']),
    ("schedule", "kind = 'wsd'\ndecay_steps = 8\nwarmup_steps = 3", ["together more than train.steps = 10"]),
    (
        "data",
        "format = 'text'\ntoo_long = 'error'",
        ['data.too_long = "error" does not apply to data.packing = "concat"'],
    ),
    (
        "data",
        "packing = 'concat'\ntoo_long = 'drop'",
        ['data.too_long = "drop" does not apply to data.packing = "concat"'],
    ),
    ("data", "format = 'chat'\npacking = 'concat'", ["which is not for chat"]),
    ("data", "format = 'tokens'\ncolumns = { text = 'a' }", ['data.columns = {"text": "a"} is for text and chat']),
    ("data", "format = 'text'\ntrain_on = ['user']", ['data.train_on = ["user"] is for chat']),
    ("data", "format = 'tokens'\non_bad_row = 'skip'", ['data.on_bad_row = "skip" is for text and chat']),
    ("data", "format = 'chat'\nspecial_tokens = 'parse'", ['is for text, and the data\'s format is "chat"']),
    ("data", "train_on = ['bot']", ["data.train_on"]),
    ("data", "train_on = []", ["data.train_on"]),
    ("train", "epochs = 2", ["train.steps = 10 and train.epochs = 2 exclude each other", "line 9"]),
    ("train", "epochs = 1.5", ["train.epochs = 1.5 must be a whole number of at least 1"]),
    ("data", "packing = 1", ['data.packing = 1 must be one of "concat", "best_fit" or true or false']),
    ("data", "tokenizer = ''", ["data.tokenizer", "not empty"]),
    ("checkpoint", "keep = 0", ["checkpoint.keep = 0"]),
    ("checkpoint", "every = -1", ["checkpoint.every = -1"]),
    ("checkpoint", "resume = false", ["checkpoint.resume = false"]),
    ("log", "every = 0", ["log.every = 0"]),
    ("fsdp", "param_dtype = 'fp8'", ['fsdp.param_dtype = "fp8"', '"float32", "bfloat16", "float16"']),
    ("model", "type = 'qwen3'", ["model.name", "model.type", "exclude each other"]),
    ("model", "config = 3", ["model.config = 3 must be a table"]),
    ("model", "config = {a = {b = 2024-01-01}}", ["model.config.a.b = 2024-01-01 is a date"]),
    ("model", "config = {a = [nan]}", ["model.config.a[0] = nan must be a finite number"]),
    ("tp", "plan = {x = 3}", ["tp.plan", "a table of strings"]),
    ("mesh", "fsdp_size = 2\ndp_shard = 2", ["mesh.fsdp_size = 2 and mesh.dp_shard = 2 are the same key"]),
    ("fsdp", "mode = 'manual'", ['fsdp.mode = "manual" needs the modules', "[fsdp.modules]"]),
    ("fsdp", "modules = {a = ['keep_full_weight']}", ['[fsdp.modules] contradicts fsdp.mode = "auto"']),
    ("fsdp", "modules = 3", ["fsdp.modules = 3 must be a table"]),
    ("fsdp", "modules = {a = 'keep'}", ['fsdp.modules.a = "keep": "keep" is not a policy', '"keep_full_weight"']),
    ("fsdp", "modules = {a = ['cpu_offload', 3]}", ["3 is not a policy"]),
    ("fsdp", "modules = {a = ['free_full_weight', 'keep_full_weight']}", ["fsdp.modules.a", "both frees and keeps"]),
    ("fsdp", "modules = {'a.*' = {offload = true}}", ['fsdp.modules."a.*" has no key "offload"', "cpu_offload"]),
    ("fsdp", "modules = {a = {cpu_offload = 1}}", ["fsdp.modules.a.cpu_offload = 1 must be one of true, false"]),
    ("fsdp", "modules = {a = {mixed_precision = 'float16'}}", ["fsdp.modules.a.mixed_precision", '"bfloat16"']),
    ("fsdp", "modules = {'' = {}}", ["empty"]),
    (
        "fsdp",
        "mode = 'manual'\nparam_dtype = 'float32'\nmodules = {a = 'mixed_precision'}",
        ["fsdp.modules.a asks for mixed_precision", "name the dtype"],
    ),
    ("fsdp", "fsdp_version = 1", ["fsdp.fsdp_version = 1", "FSDP2 only"]),
    ("fsdp", "version = true", ["fsdp.version = true"]),
    ("fsdp", "state_dict_type = 'FULL_STATE_DICT'", ["fsdp.state_dict_type", "ndtrain convert"]),
    ("fsdp", "auto_wrap_policy = 'SIZE_BASED_WRAP'", ["fsdp.auto_wrap_policy", "[fsdp.modules]"]),
    ("fsdp", "activation_checkpointing = 'yes'", ["fsdp.activation_checkpointing", "true or false"]),
    ("fsdp", "transformer_layer_cls_to_wrap = []", ["fsdp.transformer_layer_cls_to_wrap = [] must be a class name"]),
    (
        "fsdp",
        "mode = 'auto'\ntransformer_layer_cls_to_wrap = ['A']",
        ['fsdp.mode = "auto" and fsdp.transformer_layer_cls_to_wrap = ["A"] contradict'],
    ),
    (
        "fsdp",
        "mode = 'manual'\ntransformer_layer_cls_to_wrap = ['A']\nmodules = {B = {}}",
        ["fsdp.transformer_layer_cls_to_wrap", "fsdp.modules", "are the same key"],
    ),
    (
        "fsdp",
        "fsdp_sync_module_states = true",
        ["fsdp.fsdp_sync_module_states = true applies to FSDP1 only", "load.mode"],
    ),
    ("fsdp", "use_orig_params = true", ["applies to FSDP1 only", "original parameters"]),
    ("fsdp", "limit_all_gathers = true", ["applies to FSDP1 only"]),
    ("fsdp", "backward_prefetch = 'BACKWARD_PRE'", ["applies to FSDP1 only"]),
    ("fsdp", "forward_prefetch = false", ["applies to FSDP1 only"]),
    (
        "fsdp",
        "sharding_strategy = 'FULL_SHARD'",
        ["applies to FSDP1 only", "reshard_after_forward", "mesh.dp_replicate"],
    ),
]


@pytest.mark.parametrize(("section", "line", "words"), WRONG, ids=[f"{s}-{x}" for s, x, _ in WRONG])
def test_an_error_names_the_key_the_value_and_the_rule(recipe: Any, section: str, line: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(with_line(line, section))
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "r.toml" in message


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('columns = { tex = "content" }', "text has text; chat has messages"),
        ('columns = { text = "a", messages = "b" }', "chat has messages"),
        ('format = "text"\ncolumns = { messages = "a" }', "text has text ("),
    ],
)
def test_columns_must_be_fields_of_one_format(recipe: Any, lines: str, said: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.columns = .* must have names of one format's fields: ") as caught:
        recipe(with_line(lines, "data"))
    assert said in str(caught.value)
    assert recipe(with_line('columns = { text = "content" }', "data")).data.columns == {"text": "content"}


LATER = [
    ("optim", "state_dtype = 'int8'"),
    ("fsdp", "param_dtype = 'float16'"),
    ("fsdp", "reduce_dtype = 'float16'"),
    ("model", "experts = 'grouped_mm'"),
    ("model", "dtype = 'bfloat16'"),
]


@pytest.mark.parametrize(("section", "line"), LATER)
def test_unsupported_values_are_refused_not_ignored(recipe: Any, section: str, line: str) -> None:
    with pytest.raises(RecipeError, match=r"is not available in this version: .* \(.*r\.toml, line \d+\)$"):
        recipe(with_line(line, section))


def test_every_unsupported_value_has_a_case() -> None:
    assert {(section, line.split(" =")[0]) for section, line in LATER} == set(NOT_YET)


@pytest.mark.parametrize(
    "key",
    [
        ("model", "name"),
        ("data", "path"),
        ("data", "seq_len"),
        ("optim", "lr"),
        ("train", "steps"),
        ("run", "dir"),
    ],
)
def test_a_missing_required_key_is_named(recipe: Any, key: tuple[str, str]) -> None:
    text = re.sub(rf"(\[{key[0]}\]\n(?:\w.*\n)*?){key[1]} = .*\n", r"\1", MINIMAL)
    with pytest.raises(RecipeError, match=rf"^{key[0]}\.{key[1]} is required"):
        recipe(text)


def test_an_error_names_the_line(recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"r\.toml, line 9\)"):
        recipe(MINIMAL.replace("steps = 10", "stpes = 10"))
    with pytest.raises(RecipeError, match=r'train\.steps = "ten" must be .*line 9\)'):
        recipe(MINIMAL.replace("steps = 10", 'max_steps = "ten"'))
    text = 'train.steps = "x"\n' + MINIMAL.replace("[train]\nsteps = 10\n", "")
    with pytest.raises(RecipeError, match=r"line 1\)"):
        recipe(text)
    prose = MINIMAL.replace('path = "data"', 'path = """\n[train]\nsteps = 1\n"""\ntokenizer = 3')
    with pytest.raises(RecipeError, match=r"data\.tokenizer = 3 .*line 8\)"):
        recipe(prose)


def test_at_most_five_errors_are_reported_at_once(recipe: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(with_line("tp = 0\ncp = 0\nep = 0\ndp_shard = 0\nx = 1\ny = 2", "mesh"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[-1].endswith("and 1 more")


@pytest.mark.parametrize("text", ["", "model = 3", "[[model]]\nname='x'", "model = 'x'\n" + MINIMAL[30:]])
def test_sections_must_be_tables(recipe: Any, text: str) -> None:
    with pytest.raises(RecipeError):
        recipe(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[model", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
        (b"a = " + b"[" * 20000, "not valid TOML"),
        (b"[a]\n[a]\n", "not valid TOML"),
        (b"a = 1\r b = 2", "not valid TOML"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "f.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / ("x" * 300))


def test_a_model_from_scratch_needs_type_and_tokenizer(recipe: Any) -> None:
    text = MINIMAL.replace('name = "org/model"', 'type = "llama"')
    with pytest.raises(RecipeError, match=r'data\.tokenizer is required .*"bytes"'):
        recipe(text)
    r = recipe(text, "data.tokenizer=bytes")
    assert (r.model.name, r.model.type, r.model.init) == (None, "llama", "random")
    with pytest.raises(RecipeError, match=r'model\.init = "pretrained" contradicts model\.type'):
        recipe(text, "data.tokenizer=bytes", "model.init=pretrained")
    with pytest.raises(RecipeError, match=r"model\.name is required: .*model\.type"):
        recipe(MINIMAL.replace('name = "org/model"\n', ""))


def test_special_tokens_are_parsed_by_tokenizers_that_have_some(recipe: Any) -> None:
    assert recipe().data.special_tokens == "text"
    assert recipe(MINIMAL, "data.special_tokens=parse").data.special_tokens == "parse"
    with pytest.raises(RecipeError, match=r'special_tokens = "parse" does not apply to data\.tokenizer = "bytes"'):
        recipe(MINIMAL, "data.special_tokens=parse", "data.tokenizer=bytes")


def test_keys_of_prepared_tokens_are_refused_for_text(recipe: Any) -> None:
    tokens = recipe(MINIMAL, "data.format=tokens", "data.documents=eos", "data.token_dtype=int32").data
    assert (tokens.documents, tokens.token_dtype) == ("eos", "int32")
    for key, value in (("documents", "rows"), ("token_dtype", "uint16")):
        with pytest.raises(RecipeError, match=rf'data\.{key} = "{value}" is for tokens, and .* is "text"'):
            recipe(MINIMAL, "data.format=text", f"data.{key}={value}")
    with pytest.raises(RecipeError, match=r'special_tokens = "parse" is for text, and the data.s format is "tokens"'):
        recipe(MINIMAL, "data.format=tokens", "data.special_tokens=parse")


HELD_OUT = MINIMAL + '[eval]\npath = "held-out"\n'


def test_eval_has_what_data_has_unless_it_says_otherwise(recipe: Any) -> None:
    r = recipe(HELD_OUT, "data.packing=false", "checkpoint.every=7", "eval.rows=9")
    assert (r.eval.path, r.eval.seq_len, r.eval.packing, r.eval.every, r.eval.rows) == ("held-out", 16, False, 7, 9)
    assert (r.eval.at_start, r.eval.patience, recipe().eval) == (False, None, None)
    assert recipe(HELD_OUT).eval.every == 500 and recipe(HELD_OUT, "eval.every=0").eval.every == 0
    own = r.held_out()
    assert own.data == r.data.model_copy(update={"path": "held-out", "shuffle": False}) and own.train == r.train
    assert recipe(to_toml(r)) == r and "[eval]" not in to_toml(recipe())


def test_eval_takes_what_is_meant_of_a_path_only_for_the_same_path(recipe: Any) -> None:
    of_path = ["data.path=org/texts", "data.subset=en", "data.split=train", "data.revision=v1"]
    same = recipe(HELD_OUT, *of_path, "eval.path=org/texts", "eval.split=validation").eval
    assert (same.subset, same.split, same.revision) == ("en", "validation", "v1")
    other = recipe(HELD_OUT, *of_path).eval
    assert (other.subset, other.split, other.revision) == (None, None, "main")


def test_what_eval_takes_from_data_is_reported_once(recipe: Any) -> None:
    with pytest.raises(RecipeError, match=r"^data\.seq_len is required: a whole number of at least 2 \(.*\)$"):
        recipe(HELD_OUT.replace("seq_len = 16\n", ""))
    with pytest.raises(RecipeError, match=r"^data\.packing = 3 must be [^\n]*$"):
        recipe(HELD_OUT, "data.packing=3")


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (MINIMAL, ["checkpoint.keep_best=true"], r"checkpoint\.keep_best = true needs a held-out loss"),
        (MINIMAL, ["eval.every=3"], r"eval\.path is required"),
        (HELD_OUT, ["eval.patience=2", "eval.every=0"], r"eval\.patience = 2 needs evaluations before the end"),
        (
            HELD_OUT,
            ["data.packing=false", "eval.packing=true"],
            r"eval\.packing = true needs packing in",
        ),
        (HELD_OUT, ["eval.shuffle=true"], r'\[eval\] has no key "shuffle"; it belongs to \[data\]'),
        (HELD_OUT, ["data.format=text", "eval.documents=eos"], r'eval\.documents = "eos" is for tokens'),
        (
            HELD_OUT,
            ["data.tokenizer=bytes", "eval.special_tokens=parse"],
            r'eval\.special_tokens = "parse" does not apply',
        ),
    ],
)
def test_contradictions_about_held_out_data_are_refused(
    recipe: Any, text: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(text, *overrides)


def test_what_data_does_not_support_eval_does_not_either(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOT_YET, ("data", "packing"), ((True,), "a reason"))
    with pytest.raises(RecipeError, match=r"^eval\.packing = false is not available in this version: [^\n]*$"):
        recipe(HELD_OUT, "eval.packing=false")
    with pytest.raises(RecipeError, match=r"^data\.packing = false is not available in this version: [^\n]*$"):
        recipe(HELD_OUT, "data.packing=false")


def test_a_resolved_recipe_reads_back_equal(recipe: Any) -> None:
    text = MINIMAL.replace('name = "org/model"', 'type = "llama"\nconfig = {hidden_size = 8, rope = {theta = 1.5}}')
    for r in (
        recipe(),
        recipe(text, "data.tokenizer=bytes", 'run.dir="ä \\"b\\" \\n"', "optim.eps=1e-12"),
        recipe(MINIMAL, "schedule.kind=wsd", "schedule.decay_steps=2", "train.seed=9223372036854775807"),
    ):
        assert recipe(to_toml(r)) == r
        assert "async = true" in to_toml(r)
        assert tomli.loads(to_toml(r))["train"]["micro_batch_size"] == 4


SAMPLES: dict[str, Any] = {"name": "n", "type": "t", "attn": "eager", "lr": 0.5, "eps": 0.5, "kind": "linear"}
SAMPLES |= {
    "experts": "auto",
    "dtype": "float32",
    "packing": False,
    "max_grad_norm": 0.5,
    "min_lr_ratio": 0.5,
}
SAMPLES |= {"activation_checkpointing": True, "resume": "never", "dir": "d"}
SAMPLES |= {"reshard_after_forward": False, "cpu_offload": True, "at_start": True}


@pytest.mark.parametrize(("section", "alias"), ALIASES)
def test_aliases_are_read_with_a_note(recipe: Any, section: str, alias: str) -> None:
    key = ALIASES[section, alias]
    value = SAMPLES.get(key, 3)
    replaced = "steps" if key == "epochs" else key
    text = re.sub(rf"(\[{section}\]\n(?:\w.*\n)*?){replaced} = .*\n", r"\1", MINIMAL)
    extra = []
    if key == "type":
        text = text.replace('name = "org/model"\n', "")
        extra = ["data.tokenizer=bytes"]
    if section == "eval":
        extra = ["eval.path=held-out"]
    header = f"[{section}]\n"
    line = f"{alias} = {json.dumps(value)}\n"
    text = text.replace(header, header + line) if header in text else text + header + line
    r = recipe(text, *extra)
    expected = dict(VALUES.get((section, alias), [])).get(value, value)
    assert getattr(getattr(r, section), key) == expected
    (note,) = r.notes
    assert f"{section}.{alias} is read as {section}.{key}" in note


# A line of [fsdp], and the keys that it sets
FSDP_CONFIG: list[tuple[str, dict[tuple[str, str], Any]]] = [
    ("activation_checkpointing = true", {("train", "activation_checkpointing"): "full"}),
    ("fsdp_activation_checkpointing = false", {("train", "activation_checkpointing"): "none"}),
    ("cpu_ram_efficient_loading = true", {("load", "mode"): "rank0"}),
    ("fsdp_cpu_ram_efficient_loading = false", {("load", "mode"): "sharded"}),
    ("fsdp_auto_wrap_policy = 'TRANSFORMER_BASED_WRAP'", {("fsdp", "mode"): "auto"}),
    ("transformer_layer_cls_to_wrap = ['A', 'B']", {("fsdp", "mode"): "manual", ("fsdp", "modules"): ["A", "B"]}),
    ("fsdp_transformer_layer_cls_to_wrap = 'A,B'", {("fsdp", "mode"): "manual", ("fsdp", "modules"): ["A", "B"]}),
    ("state_dict_type = 'SHARDED_STATE_DICT'", {}),
    ("fsdp_version = 2", {}),
    ("version = 2", {}),
]


@pytest.mark.parametrize(("line", "sets"), FSDP_CONFIG, ids=[line for line, _ in FSDP_CONFIG])
@pytest.mark.parametrize("by", ["file", "--set"])
def test_keys_of_fsdp_config_are_translated(recipe: Any, line: str, sets: dict[tuple[str, str], Any], by: str) -> None:
    r = recipe(with_line(line, "fsdp")) if by == "file" else recipe(MINIMAL, "fsdp." + line.replace(" = ", "=", 1))
    for (section, key), value in sets.items():
        got = getattr(getattr(r, section), key)
        assert (list(got) if key == "modules" else got) == value
    (note,) = r.notes
    assert note.startswith("fsdp." + line.split(" =")[0])
    if not sets:
        assert r.model_dump() == recipe().model_dump() and "ndtrain always does this" in note


def test_wrapped_classes_and_the_wrap_policy_may_both_be_given(recipe: Any) -> None:
    lines = "auto_wrap_policy = 'TRANSFORMER_BASED_WRAP'\ntransformer_layer_cls_to_wrap = ['A']"
    for more in ("", "\nmode = 'manual'"):
        assert recipe(with_line(lines + more, "fsdp")).fsdp.mode == "manual"


@pytest.mark.parametrize(
    ("fsdp", "other", "words"),
    [
        ("activation_checkpointing = false", "train.activation_checkpointing", '"full"'),
        ("fsdp_activation_checkpointing = true", "train.gradient_checkpointing", "true"),
        ("cpu_ram_efficient_loading = true", "load.mode", '"sharded"'),
    ],
)
def test_one_setting_in_two_sections_is_refused(recipe: Any, fsdp: str, other: str, words: str) -> None:
    section, key = other.split(".")
    text = with_line(f"{key} = {words}", section) + f"[fsdp]\n{fsdp}\n"
    with pytest.raises(RecipeError, match="are the same key; keep one") as caught:
        recipe(text)
    assert f"{other} = {words}" in str(caught.value) and f"fsdp.{fsdp}" in str(caught.value)
    assert re.search(r"r\.toml, line \d+\)$", str(caught.value))


def test_short_module_policies_are_expanded(recipe: Any) -> None:
    text = (
        MINIMAL
        + """
[fsdp]
mode = "manual"
[fsdp.modules]
"a.*" = "keep_full_weight"
b = ["free_full_weight", "cpu_offload", "mixed_precision"]
c = {policy = "keep_full_weight", mixed_precision = "float32", cpu_offload = false}
D = {}
"""
    )
    r = recipe(text, 'fsdp.modules."e.f"=free_full_weight')
    policies = {name: tuple(policy.model_dump().values()) for name, policy in r.fsdp.modules.items()}
    assert policies == {
        "a.*": ("keep_full_weight", None, None),
        "b": ("free_full_weight", True, True),
        "c": ("keep_full_weight", False, "float32"),
        "D": (None, None, None),
        "e.f": ("free_full_weight", None, None),
    }
    assert recipe(to_toml(r)) == r


def test_values_of_aliases_are_translated(recipe: Any) -> None:
    assert recipe(MINIMAL, "train.gradient_checkpointing=false").train.activation_checkpointing == "none"
    assert recipe(MINIMAL, "schedule.lr_scheduler_type=constant_with_warmup").schedule.kind == "constant"
    with pytest.raises(RecipeError, match=r"train\.activation_checkpointing = 1 must be"):
        recipe(MINIMAL, "train.gradient_checkpointing=1")


def test_set_overrides_keys_of_the_file(recipe: Any) -> None:
    r = recipe(
        MINIMAL,
        "train.steps=7",
        "model.name=org/other",
        "optim.betas=[0.8, 0.9]",
        "model.config.hidden_size=8",
        "model.config.rope.theta=2.5",
        "run.dir=2026-01-31",
        "data.path=a=b",
        "mesh.fsdp_size=2",
        "mesh.tp=2",
        "mesh={cp=3}",
    )
    assert (r.train.steps, r.model.name, r.optim.betas) == (7, "org/other", (0.8, 0.9))
    assert r.model.config == {"hidden_size": 8, "rope": {"theta": 2.5}}
    assert (r.run.dir, r.data.path) == ("2026-01-31", "a=b")
    assert (r.mesh.dp_shard, r.mesh.tp, r.mesh.cp) == (2, 2, 3)
    assert recipe(with_line("dp_shard = 4", "mesh"), "mesh.fsdp_size=2").mesh.dp_shard == 2


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.steps", "not of the form section.key=value"),
        ("=3", "not of the form section.key=value"),
        ("train..steps=3", "not of the form section.key=value"),
        ("train.=3", "not of the form section.key=value"),
        ("a b=3", "not of the form section.key=value"),
        ("a=1\nb=2", "section"),
        ("train.steps=[1", "looks like TOML but is not valid"),
        ("train.steps=ten", r'train\.steps = "ten" must be a whole number.* \(--set train\.steps=ten\)'),
        ("train.steps=", r'train\.steps = "" must be'),
        ("train.stpes=3", r'\[train\] has no key "stpes"; did you mean "steps"\? \(--set train\.stpes=3\)'),
        ("trian.steps=3", r"did you mean \[train\]\?"),
        ("train=3", "train = 3 must be a table"),
        ("train.steps.x=3", r"train\.steps = \{"),
        ("run.dir=\udcff", "not of the form"),
        ("train.steps=" + "9" * 5000, "train.steps"),
    ],
)
def test_a_wrong_set_argument_is_refused_in_one_line(recipe: Any, argument: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        recipe(MINIMAL, argument)
    assert "\n" not in str(caught.value)


def test_recipes_are_frozen(recipe: Any) -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe().train.steps = 3


def test_the_schema_file_is_up_to_date() -> None:
    stored = json.loads((ROOT / "recipes" / "schema.json").read_text())
    assert stored == json_schema(), "run: python -m ndtrain.recipe > recipes/schema.json"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    assert load_recipe(path).notes == ()


def test_every_quickstart_command_loads_its_recipe() -> None:
    """Load the recipe with the --set arguments of each of the script's runs."""
    root = Path(__file__).parent.parent
    script = (root / "launch" / "quickstart.sh").read_text().replace("\\\n", " ")
    runs = [line for line in script.splitlines() if "recipes/quickstart.toml" in line]
    assert len(runs) == 3
    for line in runs:
        load_recipe(root / "recipes" / "quickstart.toml", ["data.path=x", *re.findall(r"--set (\S+)", line)])


def test_a_byte_order_mark_is_read_past(recipe: Any) -> None:
    assert recipe("\ufeff" + MINIMAL) == recipe()


def test_a_learning_rate_of_zero_works(recipe: Any) -> None:
    assert recipe(MINIMAL.replace("1e-3", "0.0")).optim.lr == 0.0
    assert recipe(MINIMAL, "optim.lr=0").optim.lr == 0.0
    with pytest.raises(RecipeError, match=r"optim\.lr = -1\.0 must be a number of at least 0"):
        recipe(MINIMAL, "optim.lr=-1.0")


@pytest.mark.parametrize("key", ["model.name", "data.path", "data.tokenizer", "checkpoint.resume", "run.dir"])
def test_paths_are_expanded_in_the_recipe_and_in_overrides(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch")
    section, name = key.split(".")
    for given, wanted in {
        "~/x": "/home/ada/x",
        "$SCRATCH/x": "/scratch/x",
        "a/${SCRATCH}b": "a//scratchb",
        "a~b": "a~b",
        "5$": "5$",
    }.items():
        line = f'{name} = "{given}"'
        there = re.search(rf"\[{section}\]\n{name} = .*", MINIMAL)
        text = MINIMAL.replace(there[0], f"[{section}]\n{line}") if there else with_line(line, section)
        assert getattr(getattr(recipe(text), section), name) == wanted
        assert getattr(getattr(recipe(MINIMAL, f"{key}={given}"), section), name) == wanted
    with pytest.raises(RecipeError, match=rf"{key} needs the environment variable NOWHERE.*--set {key}=\$NOWHERE"):
        recipe(MINIMAL, f"{key}=$NOWHERE/x")


def test_expanded_paths_are_what_a_run_writes_down(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert recipe(to_toml(recipe(MINIMAL, "run.dir=$SCRATCH/x"))).run.dir == "/scratch/x"
