"""The house: its rooms are those of the README, imports have no circle, no module is too long."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ndtrain"
MODULES = sorted(PACKAGE.rglob("*.py"))
# The size at which a module is to become a package.
LONGEST = 420


def rooms_of_the_readme() -> dict[str, int]:
    """{room: layer} of the table in the README's section "Develop"."""
    section = (ROOT / "README.md").read_text().split("\n## Develop\n")[1]
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)/?` \|", section, re.MULTILINE)
    return {room: int(layer) for layer, room in rows}


def test_the_readme_has_every_room_and_no_other() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" and not path.name.startswith("__")}
    found |= {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(rooms_of_the_readme()) == found


def test_the_contract_on_imports_has_the_order_of_the_readme() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    written = {room: len(layers) - i for i, row in enumerate(layers) for room in row.split(" | ")}
    assert written == {room.removesuffix(".py"): layer for room, layer in rooms_of_the_readme().items()}


def test_few_modules_lie_outside_a_room() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_no_module_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_imports_have_no_circle() -> None:
    graph = grimp.build_graph("ndtrain", exclude_type_checking_imports=False)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    # Modules that import nothing that is left are taken away, until none is left or those of circles are.
    while free := [module for module, others in imports.items() if not others & imports.keys()]:
        for module in free:
            del imports[module]
    assert imports == {}


def distributed_names(source: str) -> set[str]:
    """Full names of what a module takes from torch.distributed, also inside functions and by attribute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if name.startswith("torch.distributed")}


def test_data_and_plans_need_no_process_group() -> None:
    """Plans name placements, which are data; nothing else of torch.distributed."""
    placements = ("torch.distributed.tensor.placement_types.", "torch.distributed.tensor.DTensor")
    for room in ("data", "plan"):
        for path in (PACKAGE / room).rglob("*.py"):
            names = distributed_names(path.read_text(encoding="utf-8"))
            assert not {name for name in names if not name.startswith(placements) or room == "data"}, path


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "def f():\n    import torch\n    torch.distributed.barrier()",
    ],
)
def test_each_way_to_take_something_from_torch_distributed_is_seen(source: str) -> None:
    assert distributed_names(source)
