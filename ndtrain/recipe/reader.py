"""Read a recipe file and `--set` arguments into a `Recipe`, or raise a `RecipeError` with one line per problem."""

import datetime
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli
import tomli_w
from pydantic import ValidationError

from ndtrain.errors import RecipeError
from ndtrain.recipe.aliases import ALIASES, canonical
from ndtrain.recipe.data import SHARED
from ndtrain.recipe.paths import expand_paths
from ndtrain.recipe.problems import Key, Problem, RulesBroken, dotted, index, is_index, show
from ndtrain.recipe.resuming import NEVER
from ndtrain.recipe.rules import contradictions, not_yet
from ndtrain.recipe.schema import Recipe
from ndtrain.recipe.sections import ENTRIES, sections
from ndtrain.storage.urls import without_secrets

MAX_PROBLEMS = 5
_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_DOTTED = rf"{_KEY}(?:[ \t]*\.[ \t]*{_KEY})*"
_HEADER = re.compile(rf"[ \t]*\[(\[)?[ \t]*({_DOTTED})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, with each `section.key=value` of `overrides` applied.

    Raises `RecipeError` with one line for each problem, at most five.
    """
    name = str(path) if str(path).isprintable() else ascii(str(path))
    text = _read(path, name)
    try:
        raw = tomli.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        reason = re.sub(r"\(at (line.*)\)$", r"(\1)", " ".join(str(error).split())) or "nested too deeply"
        raise RecipeError(f"{name} is not valid TOML: {reason}") from None
    spelled: dict[Key, Key] = {}
    notes: list[str] = []
    arguments: dict[Key, str] = {}
    lines = _line_numbers(text)

    def line(at: Key) -> int | None:
        """Return the line of the key `at`, or of the innermost table around it."""
        prefixes = (at[:length] for length in range(len(at), 0, -1))
        return next((lines[found] for p in prefixes if (found := spelled.get(p, p)) in lines), None)

    def where(at: Key) -> str:
        for length in range(len(at), 0, -1):
            if at[:length] in arguments:
                return f"(--set {arguments[at[:length]]})"
        return f"({name}, line {line(at)})" if line(at) else f"({name})"

    try:
        document = canonical(raw, spelled, notes)
    except RulesBroken as broken:
        raise RecipeError(_listed([f"{sentence} {where(at)}" for at, sentence in broken.problems])) from None
    for argument in overrides:
        _override(document, argument, arguments, notes)
    problems = [*_unusable(document, ()), *expand_paths(document)]
    if not problems:
        for section in set(Recipe.model_fields) - {"eval"}:
            document.setdefault(section, {})  # a missing section is then reported key by key
        try:
            recipe = Recipe.model_validate(document)
        except ValidationError as error:
            problems = list(_problems(error, document))
        else:
            problems = [*contradictions(recipe), *not_yet(recipe), *_not_allowed(recipe)]
            if not problems:
                return recipe.noted(notes)

    def last_if_missing(problem: Problem) -> tuple[bool, int]:
        # A misspelt key leaves another one missing; list the cause first.
        section, *key = at = problem[0]
        there = section in document and (not key or key[0] in document[section])
        return not there, line(at) or 0

    problems.sort(key=last_if_missing)
    raise RecipeError(without_secrets(_listed([f"{sentence} {where(at)}" for at, sentence in problems])))


def _listed(problems: list[str]) -> str:
    """Return the first problems, one a line, and the number of the others."""
    shown = problems[:MAX_PROBLEMS]
    if len(problems) > MAX_PROBLEMS:
        shown[-1] += f"; and {len(problems) - MAX_PROBLEMS} more"
    return "\n".join(shown)


def to_toml(recipe: Recipe) -> str:
    """Return the recipe with all defaults filled in, as TOML that `load_recipe` reads back to an equal recipe."""
    return tomli_w.dumps(recipe.model_dump(by_alias=True, exclude_none=True))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ndtrain recipe"}


def _read(path: Path, name: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise RecipeError(f"the recipe {name} does not exist") from None
    except IsADirectoryError:
        raise RecipeError(f"{name} is a directory, not a recipe file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not UTF-8 text: invalid byte at offset {error.start}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"the recipe {name} cannot be read: {reason}") from None


def _override(document: dict[str, Any], argument: str, arguments: dict[Key, str], notes: list[str]) -> None:
    """Apply one `--set key=value` to `document`, in place."""
    shown = argument if argument.isprintable() else ascii(argument)
    key, equals, text = argument.partition("=")
    parts: list[str] = []
    try:
        argument.encode()  # fails on lone surrogates, which stand for bytes of argv that are not UTF-8
        table: Any = tomli.loads(f"{key} = 0") if equals and "\n" not in key else {}
        while isinstance(table, dict) and table:
            ((part, table),) = table.items()
            parts.append(part)
    except (ValueError, RecursionError):
        parts = []
    if not parts:
        raise RecipeError(f"--set {shown} is not of the form section.key=value")
    value = _override_value(text, shown)
    for part in reversed(parts[1:]):
        value = {part: value}
    try:
        change = canonical({parts[0]: value}, {}, notes)
    except RulesBroken as broken:
        raise RecipeError(_listed([f"{sentence} (--set {shown})" for _, sentence in broken.problems])) from None
    for section, table in change.items():
        if not isinstance(table, dict):
            document[section], arguments[(section,)] = table, shown
            continue
        for key, new in table.items():  # a whole section keeps its other keys
            at, target = (section, key, *parts[2:]), document
            for part in at[:-1]:
                inner = target.get(part)
                if not isinstance(inner, dict):
                    inner = target[part] = {}
                target = inner
            for part in parts[2:]:
                new = new[part]
            target[at[-1]], arguments[at] = new, shown


def _override_value(text: str, shown: str) -> Any:
    try:
        table = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        table = {}
    if list(table) == ["value"]:
        value = table["value"]
        # `--set run.dir=2026-01-31` means the string: no key of a recipe is a date
        return text.strip() if isinstance(value, datetime.date | datetime.time) else value
    if text.lstrip()[:1] in {'"', "'", "[", "{"}:
        raise RecipeError(
            f"--set {shown} has a value that looks like TOML but is not valid; check its quotes and brackets"
        )
    return text


def _line_numbers(text: str) -> dict[Key, int]:
    """Return the first line of each key and table. `text` must be well-formed TOML."""
    lines: dict[Key, int] = {}
    table: Key = ()
    entries: Counter[Key] = Counter()  # of arrays of tables
    inside: str | None = None  # the quotes that end the multi-line string around this line
    for number, line in enumerate(text.split("\n"), start=1):
        if inside is None:
            if header := _HEADER.match(line):
                table = _parts(header[2])
                if header[1]:
                    entries[table] += 1
                    table = (*table, index(entries[table] - 1))
                found = table
            elif assignment := _ASSIGNMENT.match(line):
                found = table + _parts(assignment[1])
            else:
                found = ()
            for length in range(1, len(found) + 1):
                lines.setdefault(found[:length], number)
        for quotes in re.findall(r'"""|\'\'\'', line):
            inside = quotes if inside is None else None if quotes == inside else inside
    return lines


def _parts(key: str) -> Key:
    return tuple(part.strip("\"'") for part in re.findall(_KEY, key))


def _unusable(value: Any, at: Key) -> Iterator[Problem]:
    """Yield a problem for each value that is valid TOML but that no key of a recipe accepts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _unusable(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _unusable(inner, (*at, index(number)))
    elif isinstance(value, float) and not math.isfinite(value):
        yield at, f"{dotted(at)} = {str(value).lower()} must be a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield at, f"{dotted(at)} = {hex(value)[:18]}... does not fit in 64 bits"
    elif isinstance(value, datetime.date | datetime.time):
        yield (
            at,
            f"{dotted(at)} = {value} is a date or time, which no key accepts; put it in quotes to give a string",
        )


def _problems(error: ValidationError, document: dict[str, Any]) -> Iterator[Problem]:
    """Yield pydantic's errors as problems, one for each key."""
    seen: set[Key] = set()
    for item in error.errors(include_url=False):
        broken = item.get("ctx", {}).get("error")
        if isinstance(broken, RulesBroken):
            yield from broken.problems
            continue
        at: Key = tuple(index(part) if isinstance(part, int) else part for part in item["loc"][: _depth(item["loc"])])
        *outer, key = at
        if at in seen:  # a union reports each of its members
            continue
        table = _at(document, outer)
        inherits = at[0] in ("data", "eval") and at[1:] and at != ("data", key)
        if inherits and key in SHARED and key not in table:
            continue  # taken from the section around it, or from [data], where it is reported
        seen.add(at)
        if item["type"] == "extra_forbidden":
            yield at, _unknown(at)
        elif is_index(key):
            yield at, f"{dotted(at)} = {show(_at(document, at))} must be a table: [[{dotted(tuple(outer))}]]"
        elif len(at) == 1:
            yield at, f"{key} = {show(table[key])} must be a table: [{key}]"
        elif item["type"] == "missing" and len(item["loc"]) == len(at):
            yield at, f"{dotted(at)} is required: {_rule(at)}"
        else:
            yield at, f"{dotted(at)} = {show(table[key])} must be {_rule(at)}"


def _depth(place: Sequence[str | int]) -> int:
    """Return how many parts of pydantic's place name a key, or an entry of an array of tables."""
    return 4 if place[1:2] and place[1] in ENTRIES else 2


def _at(document: dict[str, Any], at: Sequence[str]) -> Any:
    """Return what the document has at the key `at`."""
    found: Any = document
    for part in at:
        found = found[int(part[1:-1]) if is_index(part) else part]
    return found


def _unknown(at: Key) -> str:
    keys_of = {name: _keys(name) for name in Recipe.model_fields}
    if len(at) == 1:
        homes = [name for name, keys in keys_of.items() if at[0] in keys]
        close = difflib.get_close_matches(at[0], keys_of, n=1)
        if homes and not close:
            return f"the recipe has no section or top-level key {show(at[0])}; " + _home(homes)
        hint = f"did you mean [{close[0]}]?" if close else "its sections are " + ", ".join(keys_of)
        return f"the recipe has no section [{dotted(at)}]; {hint}"
    section, key = at[0], at[-1]
    known = keys_of[section]
    aliases = {alias: name for (home, alias), name in ALIASES.items() if home == section}
    text = f"[{section}] has no key {show(key)}; "
    if len(at) > 2:
        known, aliases = list(ENTRIES[at[1]].model_fields), {}
        text = f"{dotted(at[:-1])} has no key {show(key)}; "
    if close := difflib.get_close_matches(key, [*known, *aliases], n=1):
        return text + f'did you mean "{aliases.get(close[0], close[0])}"?'
    if homes := [name for name, keys in keys_of.items() if key in keys or (name, key) in ALIASES]:
        return text + _home(homes)
    return text + "its keys are " + ", ".join(known)


def _not_allowed(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each entry of `checkpoint.allow` that is no key, or whose change can never pass."""
    at = ("checkpoint", "allow")
    for entry in recipe.checkpoint.allow:
        key = _parts(entry)
        if reason := _no_key(key):
            yield at, f"{dotted(at)}: {show(entry)} is not a key of a recipe; {reason}"
        elif entry in NEVER:
            yield (
                at,
                f"{dotted(at)}: a resume cannot let a change of {entry} pass: {NEVER[entry]}; restore it for "
                "the resume, or choose another run.dir to train anew",
            )


def _no_key(key: Key) -> str | None:
    """Return why `key` is no key of a section, nor in a table that is one; None if it is."""
    if len(key) < 2:
        return _unknown(key) if key and key[0] not in Recipe.model_fields else "give SECTION.KEY"
    if key[0] not in Recipe.model_fields:
        return _unknown(key[:1])
    if key[1] not in _keys(key[0]):
        return _unknown(key[:2])
    schema = _schema(key)
    return f"{dotted(key[:2])} is not a table" if len(key) > 2 and schema.get("type") != "object" else None


def _home(sections: list[str]) -> str:
    return "it belongs to " + " or ".join(f"[{name}]" for name in sections)


def _keys(section: str) -> list[str]:
    return [field.alias or name for name, field in sections()[section].model_fields.items()]


def _rule(at: Key) -> str:
    """Return in words what the schema allows for the key `at`."""
    return _words(_schema(at))


def _schema(at: Key) -> dict[str, Any]:
    of_entry = len(at) > 2 and is_index(at[2])
    model = ENTRIES[at[1]] if of_entry else sections()[at[0]]
    properties: dict[str, dict[str, Any]] = model.model_json_schema(by_alias=True)["properties"]
    return properties[at[3 if of_entry else 1]]


def _words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "const" in schema:
        return show(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(show(value) for value in schema["enum"])
    match schema["type"]:
        case "boolean":
            return "true or false"
        case "string" if "pattern" in schema:
            return 'a size, such as "500MB" or "2GB"'
        case "string":
            return "a string that is not empty" if schema.get("minLength") else "a string"
        case "array" if "$ref" in schema.get("items", {}):
            return "an array of tables"
        case "array" if "items" in schema:
            return f"an array, each entry {_words(schema['items'])}"
        case "array":
            return f"an array of {schema['minItems']}, each {_words(schema['prefixItems'][0])}"
        case "object" if "properties" in schema:
            each = (f"{{ {key} = {_words(value)} }}" for key, value in schema["properties"].items())
            return " or ".join(each)
        case "object":
            values = schema.get("additionalProperties")
            return "a table of strings" if isinstance(values, dict) and values.get("type") == "string" else "a table"
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    bounds = [
        f"{word} {bound:g}" if isinstance(bound, float) else f"{word} {bound}"
        for word, bound in (("of at least", low), ("above", above), ("at most", high), ("below", below))
        if bound is not None
    ]
    return " ".join(["a whole number" if schema["type"] == "integer" else "a number", " and ".join(bounds)]).strip()
