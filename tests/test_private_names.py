"""Private names of torch and transformers: all in two modules, all as they were when ndtrain was written."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ndtrain import torch_compat
from ndtrain.hf import compat
from ndtrain.torch_compat import Private
from tests.tiny import MATRIX

ROOT = Path(torch_compat.__file__).parent
FENCED = {ROOT / "torch_compat.py", ROOT / "hf" / "compat.py"}
# Named tuples' own methods, which have an underscore to keep clear of the fields' names.
OF_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
# Attributes of torch's private classes that have no underscore.
UNMARKED = {"fsdp_params", "sharded_param", "offload_to_cpu", "all_gather_outputs", "pg_map"}
# What takes the name of an attribute or a module as a string.
BY_NAME = {
    *("getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "__getattribute__", "__getattr__"),
    *("object", "patch", "import_module", "__import__"),
}


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_every_private_name_is_where_it_was_and_takes_what_is_passed(library: str) -> None:
    names = (torch_compat if library == "torch" else compat).NAMES
    found = {name: changed for name, private in names.items() if (changed := private.check()) is not None}
    assert not found, f"torch {torch.__version__}, transformers {transformers.__version__}: {found}"


def test_a_name_that_moved_or_takes_other_parameters_is_told() -> None:
    assert "gone" in str(Private("torch.nn:Module._applied", "").check())
    assert "gone" in str(Private("torch.nowhere:x", "").check())
    assert "in this order" in str(Private("torch.nn:Module._apply", "", "recurse fn").check())
    assert "in this order" in str(Private("torch.nn:Module._apply", "", "function").check())
    assert "needs fn too" in str(Private("torch.nn:Module._apply", "", "").check())
    assert Private("torch.nn:Module._apply", "", "fn").check() is None
    assert "in this order" in str(Private("torch:ops.aten._grouped_mm", "", "self weight").check())


def test_private_attributes_of_torchs_objects_are_what_they_were(tmp_path: Path) -> None:
    """Of objects, which no table of names reaches: each function that asks for one, on a real object."""
    linear = torch.nn.Linear(2, 3)
    weight = linear.weight
    assert torch_compat.packet_of(torch.ops.aten.add.Tensor) is torch.ops.aten.add
    assert torch_compat.storage_key(weight.untyped_storage()) == torch_compat.storage_key(weight[1:].untyped_storage())
    assert torch_compat.storage_key(weight.untyped_storage()) != torch_compat.storage_key(linear.bias.untyped_storage())
    assert torch_compat.own_parameter(linear, "weight") is weight and torch_compat.own_parameter(linear, "x") is None
    other = torch.nn.Parameter(torch.zeros(3, 2))
    assert torch_compat.put_parameter(linear, "weight", other) is weight and linear.weight is other
    torch.save(torch.arange(8.0), tmp_path / "archive")
    with torch_compat.FakeTensorMode():
        start = torch_compat.offset_in_archive(torch.load(tmp_path / "archive", weights_only=True))
    assert (tmp_path / "archive").read_bytes()[start : start + 32] == torch.arange(8.0).numpy().tobytes()
    assert not torch_compat.in_backward()
    seen: list[bool] = []
    other.register_hook(lambda grad: seen.append(torch_compat.in_backward()))
    linear(torch.ones(1, 2)).sum().backward()
    assert seen == [True]


def test_private_attributes_of_fsdp_are_what_they_were() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=torch_compat.FakeStore())
    try:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)), mp_policy=low)
        fully_shard(model)
        assert torch_compat.class_before_fsdp(model[0]) is torch.nn.Linear
        assert torch_compat.class_before_fsdp(model) is torch.nn.Sequential
        names, gathered, held = [], [], []

        def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(group: Any, *args: Any, **kwargs: Any) -> Any:
                out = method(group, *args, **kwargs)
                if name == "wait_for_unshard":
                    names.append(torch_compat.fsdp_name(group))
                    gathered.extend(tuple(p.shape) for p in torch_compat.unsharded_parameters(group))
                    held.extend((tuple(p.shape), hosted) for p, hosted in torch_compat.sharded_parameters(group))
                return out

            return wrapped

        with torch_compat.fsdp_stages_wrapped(noted):
            model(torch.ones(1, 4))
        assert names == ["0"] and gathered == [(4, 4), (4,)]
        assert held == [((4, 4), False), ((4,), False)]
        assert len(torch_compat.process_groups()) >= 1
        dtypes = []
        model[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        with torch_compat.fsdp_in_float32(model):
            model(torch.ones(1, 4))
        model(torch.ones(1, 4))
        assert dtypes == [torch.float32, torch.bfloat16]
    finally:
        dist.destroy_process_group()


def test_collectives_are_counted_as_they_begin() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        other, before = dist.new_group([0]), torch_compat.collectives_begun()
        for group in (None, other, other):
            dist.all_reduce(torch.ones(1), group=group)
        assert torch_compat.collectives_begun() - before == 3
    finally:
        dist.destroy_process_group()
    assert torch_compat.collectives_begun() == 0


def test_private_attributes_of_models_are_what_they_were() -> None:
    config = transformers.AutoConfig.for_model("qwen3_moe", **MATRIX["qwen3_moe"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert compat.attention_name(model.config) == "sdpa"
    compat.set_attention_name(model.config, "eager")
    assert compat.attention_name(model.config) == "eager"
    assert compat.is_causal_lm(config) and compat.causal_lm_class(config) is type(model)
    assert compat.no_split_modules(model) == {"Qwen3MoeDecoderLayer"}
    assert not compat.comes_with_code(type(model))
    assert compat.comes_with_code(type("Own", (type(model),), {"_auto_class": "AutoModelForCausalLM"}))
    assert len(compat.recorded_outputs(model, "router_logits")) == 1 and not compat.recorded_outputs(model, "nothing")
    youtu = transformers.AutoModelForCausalLM._model_mapping[transformers.YoutuConfig]
    assert not compat.changes_loaded_weights(model) and compat.changes_loaded_weights(object.__new__(youtu))
    rule = "self_attn.q_proj.weight"
    expanded = compat.expanded_plan(model, {f"model.layers.*.{rule}": "colwise"})
    assert expanded == {f"model.layers.{layer}.{rule}": "colwise" for layer in range(config.num_hidden_layers)}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _own(tree: ast.Module) -> set[str]:
    """Private names that a module defines: its functions and classes, and the attributes of its classes."""
    found = set(OF_TUPLES)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found.add(member.name)
                elif isinstance(member, ast.AnnAssign | ast.Assign):
                    targets = [member.target] if isinstance(member, ast.AnnAssign) else member.targets
                    found |= {t.id for t in targets if isinstance(t, ast.Name)}
        stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if stored and ast.unparse(node) == f"self.{node.attr}":  # type: ignore[attr-defined]
            found.add(node.attr)  # type: ignore[attr-defined]
    return found


def _texts(tree: ast.Module) -> dict[str, str]:
    """{name: its text} of the strings that a module has names for."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _begins_with(node: ast.AST, texts: dict[str, str]) -> str:
    """The text of a string, or how an f-string or a sum of strings begins; "" for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.Name):
        return texts.get(node.id, "")
    if isinstance(node, ast.JoinedStr) and node.values:
        return _begins_with(node.values[0], texts)
    return _begins_with(node.left, texts) if isinstance(node, ast.BinOp) else ""


def _is_inside(name: str) -> bool:
    """Whether a dotted name is of something private, or in a module of transformers below its top."""
    library, *parts = name.split(".") if re.fullmatch(r"[\w.]+", name) else [""]
    if library == "transformers" and parts and parts[0] not in ("utils", "logging"):
        with suppress(ImportError):
            return importlib.util.find_spec(f"{library}.{parts[0]}") is not None
    return library in ("torch", "transformers") and any(_is_private(part) for part in parts)


def _foreign(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of what a module takes from the inside of torch or transformers."""
    own, texts = _own(tree), _texts(tree)
    for node in ast.walk(tree):
        told = f"{ast.unparse(node)}"[:100]
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if _is_inside(f"{node.module}.{alias.name}") or _is_private(alias.name):
                    yield node.lineno, told
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_inside(alias.name):
                    yield node.lineno, told
        elif isinstance(node, ast.Attribute):
            private = _is_private(node.attr) and node.attr not in own and told != "os._exit"
            if private or node.attr in UNMARKED or _is_inside(told):
                yield node.lineno, told
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            for argument in node.args[:3]:
                name = _begins_with(argument, texts)
                last = name.rpartition(".")[2]
                if _is_inside(name) or (_is_private(last) and last not in own) or last in UNMARKED:
                    yield node.lineno, told
        elif isinstance(node, ast.Subscript) and re.match(r"vars\(|.*\.__dict__$", ast.unparse(node.value)):
            yield from [(node.lineno, told)] if _is_private(_begins_with(node.slice, texts)) else []


def test_no_module_but_the_two_names_anything_private() -> None:
    found = [
        f"{path.relative_to(ROOT.parent)}:{line}: {name}"
        for path in sorted(ROOT.rglob("*.py"))
        if path not in FENCED
        for line, name in _foreign(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from torch._subclasses import fake_tensor",
        "from torch.nn import _x",
        "from torch.testing._internal.distributed import fake_pg",
        "from transformers.masking_utils import sdpa_mask",
        "from transformers import masking_utils",
        "import transformers.masking_utils as masks",
        "import torch.distributed._tools.x",
        "transformers.masking_utils.sdpa_mask(1)",
        "torch._foreach_norm(x)",
        "model._apply(f)",
        "module._parameters[name]",
        "loss._ChunkedHead",
        "group.fsdp_params",
        "getattr(config, '_attn_implementation')",
        "getattr(config, f'_{name}')",
        "NAME = '_attn_implementation'\ngetattr(config, NAME)",
        "operator.attrgetter('_parameters')(module)",
        "vars(module)['_parameters']",
        "module.__dict__['_parameters']",
        "object.__getattribute__(module, '_parameters')",
        "importlib.import_module('torch._dynamo')",
        "importlib.import_module('transformers.masking_utils')",
        "mock.patch('transformers.masking_utils.sdpa_mask', f)",
        "mock.patch.object(model, '_init_weights', f)",
    ],
)
def test_the_fence_sees_each_way_to_name_something_private(source: str) -> None:
    assert list(_foreign(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "from torch.nn import functional",
        "from transformers import PreTrainedModel",
        "import torch.distributed as dist",
        "transformers.AutoConfig.from_pretrained(x)",
        "transformers.utils.logging.disable_progress_bar()",
        "class A:\n    def f(self):\n        self._x = 1\n        return self._x",
        "box._replace(a=1)",
        "os._exit(1)",
        "getattr(module, 'weight')",
        "getattr(module, f'{name}_proj')",
    ],
)
def test_the_fence_lets_what_is_public_or_a_modules_own_pass(source: str) -> None:
    assert not list(_foreign(ast.parse(source)))
