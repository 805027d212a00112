"""300 recipes, each with one fault: 300 clean errors with exit code 2 and no traceback."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w

from ndtrain import cli
from ndtrain.recipe import json_schema

SOURCE = (Path(__file__).parent.parent / "recipes" / "quickstart.toml").read_bytes()
PER_KIND = 50


def schema_keys() -> list[tuple[str, str, dict[str, Any]]]:
    """Return (section, key, its schema) for every key that is not a free table."""
    schema = json_schema()
    found = []
    for section, entry in schema["properties"].items():
        name = entry.get("anyOf", [entry])[0]["$ref"].rsplit("/", 1)[1]
        for key, rule in schema["$defs"][name]["properties"].items():
            if rule.get("type") != "object":
                found.append((section, key, rule))
    return found


def misspelt(key: str, rng: random.Random) -> str:
    """Return `key` with a capital letter put in or added, so that it is neither a key nor an alias."""
    at = rng.randrange(len(key))
    return rng.choice([key[:at] + "X" + key[at + 1 :], key[:at] + "Q" + key[at:], key + "_X"])


def wrong_keys(rng: random.Random) -> Iterator[bytes]:
    for _ in range(PER_KIND):
        document = tomli.loads(SOURCE.decode())
        section = rng.choice(list(document))
        if rng.random() < 0.3:
            document[misspelt(section, rng)] = document.pop(section)
        else:
            key = rng.choice(list(document[section]))
            document[section][misspelt(key, rng)] = document[section].pop(key)
        yield tomli_w.dumps(document).encode()


def wrong_types(rng: random.Random) -> Iterator[bytes]:
    keys = schema_keys()
    for _ in range(PER_KIND):
        document = tomli.loads(SOURCE.decode())
        section, key, rule = rng.choice(keys)
        options = rule.get("anyOf", [rule])
        is_text = any(option.get("type") == "string" for option in options)
        wrong = [[[1]], {}, {"x": 1}, [True, "x"]] + ([7, True, 1.5] if is_text else ["", "10", "yes", "-"])
        wrong += [] if any(option.get("type") == "array" for option in options) else [[]]
        document.setdefault(section, {})[key] = rng.choice(wrong)
        yield tomli_w.dumps(document).encode()


def wrong_sizes(rng: random.Random) -> Iterator[bytes]:
    keys = [
        (section, key, rule)
        for section, key, rule in schema_keys()
        if any(option.get("type") in ("integer", "number") for option in rule.get("anyOf", [rule]))
    ]
    for _ in range(PER_KIND):
        document = tomli.loads(SOURCE.decode())
        section, key, _rule = rng.choice(keys)
        document.setdefault(section, {})[key] = rng.choice(
            [-2, -7, -(10**9), 2**63, 10**40, float("nan"), float("inf"), -0.5, float("-inf")]
        )
        yield tomli_w.dumps(document).encode()


def bad_toml(rng: random.Random) -> Iterator[bytes]:
    lines = SOURCE.decode().splitlines()
    written = [number for number, line in enumerate(lines) if "=" in line and not line.startswith("#")]
    for _ in range(PER_KIND):
        spoiled = list(lines)
        at = rng.choice(written)
        key = spoiled[at].split("=")[0]
        spoiled[at] = rng.choice(
            [
                f"{key}= ",
                f"{key} 3",
                f"{key}= [1, ",
                f'{key}= "open',
                f"{key}= 3 4",
                f"{key}= nul",
                f"= {key}",
                f"[{key}",
                f"{key}= 01",
                f"{key}= {{a = }}",
                spoiled[at] + "\n" + spoiled[at],
                "[model]\n[model]",
            ]
        )
        yield "\n".join(spoiled).encode()


def bad_bytes(rng: random.Random) -> Iterator[bytes]:
    for number in range(PER_KIND):
        at = rng.randrange(len(SOURCE))
        # Each of these is invalid UTF-8, or a control character that TOML forbids.
        yield (
            SOURCE[:at] + rng.choice([b"\xff", b"\xc0", b"\xed\xa0\x80", b"\x00", b"\x0b"]) + SOURCE[at:]
            if number % 5
            else rng.randbytes(200) + b"\x00"
        )


def spoiled_recipes() -> Iterator[tuple[str, bytes]]:
    for kind in (wrong_keys, wrong_types, wrong_sizes, bad_toml, bad_bytes):
        for number, content in enumerate(kind(random.Random(kind.__name__))):
            yield f"{kind.__name__}-{number}", content


def bad_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield paths without a valid recipe, and `--set` arguments that break a valid one."""
    good = folder / "good.toml"
    good.write_bytes(SOURCE)
    (folder / "folder.toml").mkdir()
    (folder / "link.toml").symlink_to(folder / "nowhere")
    (folder / "loop.toml").symlink_to(folder / "loop.toml")
    (folder / "empty.toml").write_bytes(b"")
    (folder / "half.toml").write_bytes(SOURCE[: len(SOURCE) // 2])
    names = [
        "none.toml",
        "folder.toml",
        "link.toml",
        "loop.toml",
        "empty.toml",
        "half.toml",
        "x" * 400,
        "good.toml/x",
    ]
    for name in names:
        yield name[:20], [str(folder / name)]
    yield "empty name", [""]
    yield "dot", [os.curdir]
    rng = random.Random("set")
    keys = schema_keys()
    for number in range(PER_KIND - 10):
        section, key, _ = rng.choice(keys)
        argument = rng.choice(
            [
                f"{section}.{misspelt(key, rng)}=1",
                f"{misspelt(section, rng)}.{key}=1",
                f"{section}.{key}",
                f"{section}.{key}=[1,",
                f"{section}.{key}={{a=[]}}",
                f"{section}.{key}=nan",
                f"{section}..{key}=1",
                f"{section}=1",
                f"={key}",
                f"{section}.{key}.deeper=1",
            ]
        )
        yield f"set-{number}", [str(good), "--set", argument]


def assert_clean(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["ndtrain", "run", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert caught.value.code == 2, (name, arguments, err)
    assert out == "", name
    lines = err.splitlines()
    assert 1 <= len(lines) <= 5, (name, err)
    assert all(line.startswith("ndtrain: error: ") and len(line) < 800 for line in lines), (name, err)


def test_300_spoiled_recipes_give_300_clean_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(cli, "launch_workers", lambda *_: pytest.fail("a spoiled recipe was accepted"))
    count = 0
    for name, content in spoiled_recipes():
        path = tmp_path / "r.toml"
        path.write_bytes(content)
        assert_clean(name, [str(path)], monkeypatch, capsys)
        count += 1
    for name, arguments in bad_files(tmp_path):
        assert_clean(name, arguments, monkeypatch, capsys)
        count += 1
    assert count == 300
