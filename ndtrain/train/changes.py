"""Compare a run with the checkpoint that it resumes from: what differs, and whether it may go on with that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ndtrain.data.mixture import Mixture
from ndtrain.errors import RecipeError
from ndtrain.mesh import MeshSizes
from ndtrain.recipe import OF_SOURCE, Recipe, sections
from ndtrain.recipe.problems import dotted, show
from ndtrain.recipe.resuming import NEVER, covers, rule_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Keys that say where something is: what is there decides whether a resume may go on.
_BASE = ("model.init", "model.name", "model.revision")
_DATA = ("data.path", "data.tokenizer")
# Keys that say how data is read: their change explains other samples of the same files.
_READ = ("data.documents", "data.token_dtype")
_MEANING = ("data.train_on", "data.chat_template", "data.on_control_text", "data.on_bad_row", "data.special_tokens")
_ROWS = ("data.columns", "data.subset", "data.split", "data.revision", *_MEANING)
# Keys that are compared elsewhere, or are about this resume alone.
_ELSEWHERE = ("mesh", "model.config", "checkpoint.resume", "checkpoint.allow")
# Keys after whose change the cursor counts samples of another order or other text.
_ORDER = (*_DATA, *_ROWS, "data.sources", "data.shuffle", "train.seed")


class Change(NamedTuple):
    """A key that differs, its values, what that means, and whether a resume may go on with it.

    That is the rule of `rule_of`, or "tokens": it may if the data turns out to give the same tokens.
    """

    key: str
    before: str
    now: str
    rule: Literal["free", "tokens", "allow", "never"]
    meaning: str = ""


def find_changes(
    state: Mapping[str, Any],
    recipe: Recipe,
    origin: Mapping[str, Any],
    *,
    sizes: MeshSizes,
    configs: tuple[Mapping[str, Any], Mapping[str, Any]],
    same_shapes: Callable[[], bool],
) -> list[Change]:
    """Return what differs between a checkpoint's train_state.json and this run; `origin` as `origin_of` returns it.

    `configs` are the model's config in the checkpoint and now; `same_shapes` says whether the checkpoint has the
    model's tensors. A checkpoint without a recipe, of an earlier version, is compared as far as it goes.
    """
    found = list(_recorded(state, recipe, origin) if "recipe" in state else _unrecorded(state, recipe, origin))
    before, now = _mesh(state.get("mesh", {})), sizes.describe()
    if "mesh" in state and before != now:
        found.append(Change("mesh", before, now, "free"))
    return [*found, *config_changes(*configs, same_shapes)]


def config_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the config as it would be read back from config.json."""
    return dict(json.loads(config.to_json_string()))


def changes_data(changes: Sequence[Change]) -> bool:
    """Return whether samples or their order differ."""
    return any(covers(_ORDER, change.key) and change.rule not in ("free", "tokens") for change in changes)


def needs_same_tokens(changes: Sequence[Change], recipe: Recipe) -> bool:
    """Return whether a resume may go on only if the data gives the same tokens, which tokenizing it shows."""
    return any(change.rule == "tokens" and not covers(recipe.checkpoint.allow, change.key) for change in changes)


def table(changes: Sequence[Change], found: Path, recipe: Recipe) -> str:
    """Return the changes as a table of one line each."""
    verdict = {"free": "", "tokens": "", "allow": "refused", "never": "refused"}
    rows = [("key", "checkpoint", "now", "")]
    for change in changes:
        word = "allowed" if _allowed(change, recipe) else verdict[change.rule]
        rows.append((change.key, change.before, change.now, ": ".join(filter(None, (word, change.meaning)))))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    ]
    return "\n".join([f"{found} differs from this run:", *(f"  {line}".rstrip() for line in lines)])


def refuse(changes: Sequence[Change], found: Path, recipe: Recipe) -> None:
    """Raise `RecipeError` with a line for each change that a resume must not let pass."""
    lines = []
    can_pass = all(change.rule != "never" for change in changes)
    for change in changes:
        if change.rule in ("free", "tokens") or _allowed(change, recipe):
            continue
        values = f" was {change.before}, is now {change.now}" if change.before != change.now else " differs"
        meaning = f" ({change.meaning})" if change.meaning else ""
        way = "restore it, or choose another run.dir to train anew"
        if change.rule == "allow" and can_pass:
            way = (
                "restore it, choose another run.dir to train anew, or let it pass with "
                f"checkpoint.allow = [{show(change.key)}]"
            )
        lines.append(f"{found}: {change.key}{values}{meaning}; {way}")
    if lines:
        raise RecipeError("\n".join(lines))


def _allowed(change: Change, recipe: Recipe) -> bool:
    return change.rule == "allow" and covers(recipe.checkpoint.allow, change.key)


def _recorded(state: Mapping[str, Any], recipe: Recipe, origin: Mapping[str, Any]) -> Iterator[Change]:
    """Yield the changes of recipe and inputs against a checkpoint that records them."""
    saved = state["origin"]
    before, now = _flat(state["recipe"]), _flat(origin["recipe"])
    mixed = bool(before.get("data.sources") and now.get("data.sources"))
    if before.get("data.packing") is True and not mixed:  # as earlier versions record "concat"
        before["data.packing"] = "concat"
    before.setdefault("data.too_long", "cut")
    # A key that a later version has added had its default.
    before = {**{key: value for key, value in _defaults().items() if key in now}, **before}
    names = [key for key in {**now, **before} if not covers(_ELSEWHERE, key) and before.get(key) != now.get(key)]
    if ("eval.seq_len" in before) != ("eval.seq_len" in now):  # then one line tells
        told = next(key for key in ("eval.path", "eval.sources") if before.get(key) != now.get(key))
        names = [key for key in names if key == told or not covers(("eval",), key)]
    if mixed:  # their tables have all keys
        names = [key for key in names if not covers([f"data.{own}" for own in OF_SOURCE], key)]
    same_place = not set(names) & set(_BASE)
    same_base = origin["base"] == saved["base"] or (same_place and None in (origin["base"], saved["base"]))
    same_data = origin["data"] == state["data"].split()[0]
    other_rows = any(covers(_ROWS, name) for name in names) and origin["content"] == saved["content"]
    templates = {saved.get("template"), origin["template"]}
    rendered = len(templates - {None}) == 2 and "data.chat_template" not in names
    same_text = origin["content"] == saved["content"] and origin["tokenizer"] == saved["tokenizer"]
    read_anew = other_rows or (rendered and same_text) or bool({*_READ} & {*names})
    changed_base = next((key for key in _BASE if key in names), "model.name")
    of_sources = bool(before.get("data.sources") or now.get("data.sources"))
    data = ("data.sources", "data.tokenizer") if of_sources else _DATA
    implied = [*([] if same_base else [changed_base]), *([] if same_data or (read_anew and not of_sources) else data)]
    implied += ["data.chat_template"] if rendered else []
    for key in dict.fromkeys([*names, *implied]):
        values = _value(before.get(key)), _value(now.get(key))
        if key in _BASE:
            if same_base or key != changed_base:
                yield Change(key, *values, "free", "the same base weights" if same_base else "")
                continue
            own, other = (
                f"{value} ({base})" for value, base in zip(values, (saved["base"], origin["base"]), strict=True)
            )
            yield Change(key, own, other, "allow", "another base")
        elif covers((*_DATA, *_ROWS), key) and same_data:
            yield Change(key, *values, "free", "the same content")
        elif key == "optim.groups" and _frozen(before.get(key)) != _frozen(now.get(key)):
            yield Change(key, *values, "never", "the checkpoint has optimizer state for what was trained alone")
        elif key == "data.sources":
            yield _sources(before.get(key) or [], now.get(key) or [], state, origin, same_data=same_data)
        elif key == "data.chat_template" and rendered:
            yield Change(key, *values, "allow", "the template has another text")
        elif key == "data.path":
            upgrade = _upgrade(saved, origin) if state.get("tokens") else ""
            yield from _files(values, saved, origin, changed=key in names, upgrade=upgrade)
        elif key == "data.tokenizer":
            if saved["tokenizer"] != origin["tokenizer"]:
                upgrade = _upgrade(saved, origin) if key not in names and state.get("tokens") else ""
                yield Change(key, *values, "tokens" if upgrade else "allow", upgrade or "it gives other tokens")
            elif key in names:
                yield Change(key, *values, "free", "the same tokenizer")
        else:
            yield Change(key, *values, rule_of(key), NEVER.get(key, "") or _meaning(key, state))


def _frozen(groups: Sequence[Mapping[str, Any]] | None) -> list[tuple[bool, list[str]]]:
    """Return what decides which parameters `[[optim.groups]]` freeze, nothing if it freezes none."""
    found = [(bool(group.get("frozen")), list(group["match"])) for group in groups or ()]
    return found[: max((at for at, (frozen, _) in enumerate(found, 1) if frozen), default=0)]


def _upgrade(saved: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Return in words which packages of the tokenizer changed; "" if none did, or the text did too."""
    before, now = saved.get("packages") or {}, origin["packages"]
    changed = [f"{name} {before[name]} -> {now.get(name)}" for name in before if before[name] != now.get(name)]
    if not changed or saved["content"] != origin["content"]:
        return ""
    return f"{', '.join(changed)}; the run goes on if the data has the same tokens"


def _files(
    values: tuple[str, str], saved: Mapping[str, Any], origin: Mapping[str, Any], *, changed: bool, upgrade: str
) -> Iterator[Change]:
    """Yield the change of data.path, where tokens differ."""
    if saved["content"] != origin["content"]:
        yield Change("data.path", *values, "allow", f"the files of data.path changed{_counted(saved, origin)}")
    elif saved["tokenizer"] == origin["tokenizer"]:
        meaning = upgrade or "this version of ndtrain reads the same files in another way"
        yield Change("data.path", *values, "tokens" if upgrade else "allow", meaning)
    elif changed:
        yield Change("data.path", *values, "free", "the same content")


def _counted(saved: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Return how many files differ, for a message; "" if that is not known."""
    old, new = saved["files"], origin["files"]
    if old is None or new is None:
        return ""
    other = sum(old[name] != new[name] for name in old.keys() & new.keys())
    return f": {len(new.keys() - old.keys())} added, {len(old.keys() - new.keys())} removed, {other} changed"


def _sources(
    before: list[dict[str, Any]],
    now: list[dict[str, Any]],
    state: Mapping[str, Any],
    origin: Mapping[str, Any],
    *,
    same_data: bool,
) -> Change:
    """Return the change of data.sources, where they or their tokens differ."""
    key, values = "data.sources", (f"{len(before)} sources", f"{len(now)} sources")
    if len(before) == len(now):
        differ = [
            (f"[{number}].{name}", old.get(name), new.get(name))
            for number, (old, new) in enumerate(zip(before, now, strict=True))
            for name in {**new, **old}
            if old.get(name) != new.get(name)
        ]
        told = [", ".join(f"{name} {_value(own[side])}" for name, *own in differ) for side in (0, 1)]
        values = (told[0], told[1])
    if not same_data:
        saved = state["origin"]
        meaning = f"the files changed{_counted(saved, origin)}" if before == now else "other data"
        if before == now and saved["content"] == origin["content"]:
            meaning = "the same files give other tokens"
        return Change(key, *values, "allow", meaning)
    one, other = (Mixture([source["weight"] for source in sources]).counts for sources in (before, now))
    if (one == other).all():
        return Change(key, *values, "free", "the same content and shares")
    return Change(key, *values, "allow", _meaning(key, state))


def _unrecorded(state: Mapping[str, Any], recipe: Recipe, origin: Mapping[str, Any]) -> Iterator[Change]:
    """Yield the changes that an earlier version's checkpoint shows: in its data, its seed and its schedule."""
    key, *fields = state["data"].split()
    written = dict(field.split("=", 1) for field in fields if "=" in field)
    if written.get("packing") == "True":  # see `_recorded`
        written["packing"] = "concat"
    now = _flat(origin["recipe"])
    for name in ("data.seq_len", "data.packing", "data.shuffle"):
        before = written.get(name.removeprefix("data."))
        if before is not None and before != str(now[name]):
            yield Change(name, before, str(now[name]), rule_of(name), NEVER.get(name, ""))
    if state["seed"] != recipe.train.seed:
        yield Change("train.seed", str(state["seed"]), str(recipe.train.seed), "allow", _meaning("train.seed", state))
    if key != origin["data"]:
        value = _value(now["data.path"])
        yield Change("data.path", value, value, "allow", "its files, or the tokenizer, changed")
    for name, value in state.get("schedule", {}).items():
        if value != now.get(f"schedule.{name}"):
            yield Change(f"schedule.{name}", _value(value), _value(now.get(f"schedule.{name}")), "free")


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any], same_shapes: Callable[[], bool]) -> list[Change]:
    """Return what differs between the model's config in the checkpoint and now; the rest as for `find_changes`."""
    ignored = {"transformers_version", "_name_or_path", "architectures", "auto_map"}
    keys = sorted(k for k in (before.keys() | now.keys()) - ignored if before.get(k) != now.get(k))
    if not keys:
        return []
    # Other keys may follow from those that shape the tensors: restore these first.
    shaping = [key for key in keys if f"model.config.{key}" in NEVER] or keys
    other = [] if same_shapes() else shaping
    return [
        Change(
            f"model.config.{key}",
            _value(before.get(key)),
            _value(now.get(key)),
            "never" if key in other else "free" if other else "allow",
            "the checkpoint's tensors have other shapes" if key in other else "",
        )
        for key in keys
    ]


def _meaning(key: str, state: Mapping[str, Any]) -> str:
    if key == "train.global_batch_size":
        return f"the data goes on at sample {state['samples']}; the learning rate follows steps, not samples"
    if covers(_ROWS, key):
        return "the files are read in another way"
    if key in _ORDER:
        return f"another order of samples, in which the data goes on at sample {state['samples']}"
    return ""


def _flat(tables: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return {dotted key: value} of a recipe's sections; the keys of tables in them are entries of their own."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        key = (*prefix, name)
        if isinstance(value, dict) and (value or not prefix):
            flat.update(_flat(value, key))
        elif value != {}:
            flat[dotted(key)] = value
    return flat


def _defaults() -> dict[str, Any]:
    return {
        f"{section}.{field.alias or name}": list(field.default) if isinstance(field.default, tuple) else field.default
        for section, model in sections().items()
        for name, field in model.model_fields.items()
        if not field.is_required() and field.default_factory is None
    }


def _mesh(sizes: Any) -> str:
    try:
        return MeshSizes(**sizes).describe()
    except TypeError:
        return _value(sizes)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'  # paths may differ at their ends alone
    return "-" if value is None else show(value)
