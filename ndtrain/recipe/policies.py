"""Expand the short forms of the policies in [fsdp.modules]."""

from __future__ import annotations

from typing import Any

from ndtrain.recipe.problems import Key, Problem, RulesBroken, dotted, show

# Key of a policy in [fsdp.modules] -> its allowed values.
MODULE_POLICY: dict[str, tuple[Any, ...]] = {
    "policy": ("free_full_weight", "keep_full_weight"),
    "cpu_offload": (True, False),
    "mixed_precision": (True, False, "float32", "bfloat16"),
}


def module_policies(modules: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the policy table of each pattern of [fsdp.modules]; a name or an array of names is short for a table.

    Raises `RulesBroken` for anything that is not a policy.
    """
    problems: list[Problem] = []
    tables: dict[str, dict[str, Any]] = {}
    for pattern, given in modules.items():
        at: Key = ("fsdp", "modules", pattern)
        table: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
        for name in () if isinstance(given, dict) else given if isinstance(given, list) else [given]:
            key, value = ("policy", name) if name in MODULE_POLICY["policy"] else (name, True)
            if not isinstance(name, str) or key not in MODULE_POLICY or name == "policy":
                names = ", ".join([*map(show, MODULE_POLICY["policy"]), '"cpu_offload" and "mixed_precision"'])
                problems.append(
                    (at, f"{dotted(at)} = {show(given)}: {show(name)} is not a policy; the policies are {names}")
                )
            elif table.setdefault(key, value) != value:
                problems.append((at, f"{dotted(at)} = {show(given)} both frees and keeps the full weight; keep one"))
        if not pattern:
            problems.append((at, "[fsdp.modules] has an empty pattern; give the name of a module"))
        for key, value in table.items():
            allowed = MODULE_POLICY.get(key, ())
            if not allowed:
                known = ", ".join(MODULE_POLICY)
                problems.append(((*at, key), f"{dotted(at)} has no key {show(key)}; its keys are {known}"))
            elif not any(type(value) is type(option) and value == option for option in allowed):
                words = ", ".join(map(show, allowed))
                problems.append(((*at, key), f"{dotted((*at, key))} = {show(value)} must be one of {words}"))
        tables[pattern] = table
    if problems:
        raise RulesBroken(problems)
    return tables
