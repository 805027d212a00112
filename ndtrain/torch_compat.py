"""Every private name of torch that ndtrain uses, with what it is for: the next release that moves one is one red test.

`from ndtrain.torch_compat import StridedShard` looks the name up in `NAMES` when it is asked for, so that importing
this module does not import torch. The functions below reach private attributes of torch's objects.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    import torch
    from torch import nn


class Private(NamedTuple):
    """A name that no promise of its library covers: where it is, what it is for, and what ndtrain passes to it.

    `where` is "module:attribute.path". `takes` has the parameters that are passed, in the order of the signature; None
    where the name is not called, or its signature cannot be asked.
    """

    where: str
    purpose: str
    takes: str | None = None

    def find(self) -> Any:
        """Return the object itself. Raises `ImportError` or `AttributeError` where it is gone."""
        module, _, path = self.where.partition(":")
        found: Any = importlib.import_module(module)
        for part in path.split(".") if path else ():
            found = getattr(found, part)
        return found

    def check(self) -> str | None:
        """Return in what way the name is not what it was when ndtrain was written; None where it is."""
        try:
            found = self.find()
        except (ImportError, AttributeError) as error:
            return f"{self.where} is gone ({error})"
        if self.takes is None:
            return None
        try:
            parameters = _parameters(found)
        except ValueError:  # a built-in: StridedShard is one in torch 2.11
            return None
        wanted = self.takes.split()
        if [name for name in parameters if name in wanted] != wanted:
            return f"{self.where} takes ({', '.join(parameters)}), not ({', '.join(wanted)}) in this order"
        if left := [name for name, needed in parameters.items() if needed and name not in wanted]:
            return f"{self.where} needs {', '.join(left)} too"
        return None


def _parameters(function: Any) -> dict[str, bool]:
    """Return {parameter: whether it must be given} of a function, a class or an operator of torch."""
    if hasattr(function, "overloads"):
        schema = getattr(function, function.overloads()[0])._schema
        return {argument.name: not argument.has_default_value() for argument in schema.arguments}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: parameter.default is parameter.empty and parameter.kind not in kinds
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }


# Read in torch 2.11 (the lowest that pyproject.toml allows), 2.13 and 2.14.
_FAKE, _FSDP = "torch._subclasses.fake_tensor", "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup"
_PARAM, _KEPT = "torch.distributed.fsdp._fully_shard._fsdp_param", "parameters that stay in float32"
_GROUPS, _PROPAGATION = "torch.distributed.distributed_c10d", "torch.distributed.tensor._sharding_prop"
_SDPA, _RING, _FLOPS = "torch:ops.aten._scaled_dot_product", "a block of ring attention", "FLOPs of a step"
_DCP, _RECORD = "torch.distributed.checkpoint", "a record of DCP's metadata"
_DRY, _FREE, _TREE = "a dry step", "an operation that moves nothing", "what a block takes and gives"
NAMES: dict[str, Private] = {
    # ---- shapes and placements
    "StridedShard": Private(
        "torch.distributed.tensor.placement_types:_StridedShard", "FSDP over tp; packed weights", "dim split_factor"
    ),
    "flatten_mesh": Private(
        "torch.distributed.device_mesh:DeviceMesh._flatten", "the mesh of the loss", "mesh_dim_name"
    ),
    # ---- trees, modes, functions that make tensors
    "tree_map": Private("torch.utils._pytree:tree_map", _TREE, "func tree"),
    "tree_leaves": Private("torch.utils._pytree:tree_leaves", _TREE, "tree"),
    "make_wrapper_subclass": Private(
        "torch:Tensor._make_wrapper_subclass",
        "a tensor that stands for another",
        "size strides dtype device requires_grad",
    ),
    "disabled_torch_function": Private("torch:_C._disabled_torch_function_impl", "a tensor that stands for another"),
    "TorchDispatchMode": Private("torch.utils._python_dispatch:TorchDispatchMode", "the operations of a step"),
    "device_constructors": Private("torch.utils._device:_device_constructors", "functions that make tensors", ""),
    "foreach_norm": Private("torch:_foreach_norm", "norms of many tensors at once"),
    "foreach_mul_": Private("torch:_foreach_mul_", "scaling of many tensors at once"),
    # ---- tensors without contents, and ranks that are not there
    "FakeTensor": Private(f"{_FAKE}:FakeTensor", _DRY),
    "FakeTensorMode": Private(f"{_FAKE}:FakeTensorMode", _DRY, "allow_non_fake_inputs"),
    "DataDependentOutputException": Private(f"{_FAKE}:DataDependentOutputException", "a step that needs contents"),
    "DynamicOutputShapeException": Private(f"{_FAKE}:DynamicOutputShapeException", "a step that needs contents"),
    "FakeStore": Private("torch.testing._internal.distributed.fake_pg:FakeStore", _DRY),
    "fake_collectives": Private("torch.distributed._tools.fake_collectives", "shapes of collectives on fake tensors"),
    # ---- operators
    "flash_for_cpu": Private(
        f"{_SDPA}_flash_attention_for_cpu", _RING, "query key value dropout_p is_causal attn_mask scale"
    ),
    "flash_for_cpu_backward": Private(
        f"{_SDPA}_flash_attention_for_cpu_backward",
        _RING,
        "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",
    ),
    "flash": Private(f"{_SDPA}_flash_attention", _RING, "query key value dropout_p is_causal return_debug_mask scale"),
    "flash_backward": Private(
        f"{_SDPA}_flash_attention_backward",
        _RING,
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed "
        "philox_offset scale",
    ),
    "efficient": Private(
        f"{_SDPA}_efficient_attention",
        _RING,
        "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
    ),
    "efficient_backward": Private(
        f"{_SDPA}_efficient_attention_backward",
        _RING,
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p grad_input_mask "
        "is_causal scale",
    ),
    "cudnn": Private(f"{_SDPA}_cudnn_attention", _FLOPS),
    "grouped_mm": Private("torch:ops.aten._grouped_mm", _FLOPS),
    "all_to_all": Private("torch:ops._c10d_functional.all_to_all_single", "recomputation without exchanges"),
    "to_copy": Private("torch:ops.aten._to_copy", "recomputation that reads nothing back"),
    "unsafe_view": Private("torch:ops.aten._unsafe_view", _FREE),
    "reshape_alias": Private("torch:ops.aten._reshape_alias", _FREE),
    # ---- process groups
    "world": Private(f"{_GROUPS}:_world", "every process group of this rank"),
    "abort_process_group": Private(f"{_GROUPS}:_abort_process_group", "to leave without waiting for other ranks", ""),
    "set_pg_timeout": Private(f"{_GROUPS}:_set_pg_timeout", "limits that differ by phase", "timeout group"),
    "resolve_process_group": Private(f"{_GROUPS}:_resolve_process_group", "the group of a functional collective"),
    # ---- the inside of FSDP and DTensor, watched during a dry step
    "FSDPParamGroup": Private(_FSDP, _DRY),
    "fsdp_pre_forward": Private(f"{_FSDP}.pre_forward", _DRY, "module args kwargs"),
    "fsdp_pre_backward": Private(f"{_FSDP}.pre_backward", _DRY, "default_prefetch"),
    "fsdp_unshard": Private(f"{_FSDP}.unshard", _DRY, "async_op"),
    "fsdp_wait_for_unshard": Private(f"{_FSDP}.wait_for_unshard", _DRY, ""),
    "fsdp_post_backward": Private(f"{_FSDP}.post_backward", _DRY, ""),
    "FSDPParam": Private(f"{_PARAM}:FSDPParam", _KEPT),
    "fsdp_dtypes": Private(f"{_PARAM}:FSDPParam.init_dtype_attrs", _KEPT, "mp_policy"),
    "fsdp_gradient": Private(f"{_PARAM}:FSDPParam.unsharded_grad_data", _KEPT),
    "forget_shardings": Private(
        "torch.distributed.tensor.debug:_clear_sharding_prop_cache", "dry steps on other meshes before", ""
    ),
    "ShardingPropagator": Private(f"{_PROPAGATION}:ShardingPropagator", _DRY),
    "propagate_tensor_meta": Private(
        f"{_PROPAGATION}:ShardingPropagator._propagate_tensor_meta_non_cached", _DRY, "op_schema"
    ),
    # ---- records in files of torch's own checkpoints
    "StorageInfo": Private(f"{_DCP}.filesystem:_StorageInfo", _RECORD, "relative_path offset length"),
    "StoragePrefix": Private(f"{_DCP}.filesystem:_StoragePrefix", _RECORD, "prefix"),
    "MEM_FORMAT_ENCODING": Private(f"{_DCP}.metadata:_MEM_FORMAT_ENCODING", _RECORD),
    # ---- autograd
    "current_graph_task_id": Private("torch:_C._current_graph_task_id", "whether a backward pass is at work", None),
    "functorch_config": Private("torch._functorch.config", "the memory that a compiled block keeps"),
    # ---- modules
    "apply_to_tensors": Private("torch.nn:Module._apply", "memory for a model that was built on meta", "fn"),
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return NAMES[name].find()


# ---- attributes of objects


def process_groups() -> list[torch.distributed.ProcessGroup]:
    """Return every process group that this rank is in."""
    return list(NAMES["world"].find().pg_map)


def abort_process_groups() -> None:
    """Leave every process group at once, with its collectives unfinished: for NCCL, after an error."""
    with suppress(RuntimeError):  # the error before it is the one to tell
        NAMES["abort_process_group"].find()()


def collectives_begun() -> int:
    """Return how many collectives this rank has begun, in all the groups that it is in."""
    total = 0
    for group in process_groups():
        with suppress(RuntimeError):  # a group whose ranks still connect
            backends: set[Any] = {group._get_backend(device) for device in group._device_types}
            total += sum(backend._get_sequence_number_for_group() for backend in backends)
    return total


def in_backward() -> bool:
    """Return whether this code runs inside a backward pass, as a block does that is recomputed."""
    return bool(NAMES["current_graph_task_id"].find()() != -1)


def within_memory_budget(function: Callable[..., Any], budget: float) -> Callable[..., Any]:
    """Return a compiled `function` whose graphs keep the share `budget` of their activations and recompute others."""
    patched: Callable[..., Any] = NAMES["functorch_config"].find().patch(activation_memory_budget=budget)(function)
    return patched


def packet_of(operator: Any) -> Any:
    """Return the operator without its overload, from what a dispatch mode is given."""
    return getattr(operator, "_overloadpacket", operator)  # operators of higher order have no overloads


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that is the storage's while it lives: Python's object for it may be another each time."""
    return storage._cdata


def offset_in_archive(tensor: torch.Tensor) -> int:
    """Return where a fake tensor's storage begins in the archive that `torch.load` took it from."""
    return tensor.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined,no-any-return,return-value]


def is_process_group(argument: Any) -> bool:
    """Return whether an operator's argument is a process group in its scripted form."""
    import torch

    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


def class_before_fsdp(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before `fully_shard`: behind FSDP's own two, as in `FSDPModule.__new__`."""
    return type(module).__mro__[2]


def put_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
    """Replace a module's own parameter without a look at what it is; returns the one before."""
    before = module._parameters[name]
    module._parameters[name] = param
    return before


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a module's own parameter, past what FSDP or a parametrization shows in its place."""
    return module._parameters.get(name)


def keep_in_float32(module: nn.Module, params: list[nn.Parameter]) -> None:
    """Let `fully_shard` gather these sharded parameters of the unit of `module` in float32, whatever its policy says.

    FSDP gathers a unit's parameters in any dtypes at once, but reduces gradients of one dtype alone, so those of the
    unit are cast to float32 first (torch <= 2.14). Its `reduce_dtype` must be that.
    """
    beside, kept = _float32_classes()
    chosen = {id(param) for param in params}
    for group in _param_groups(module._get_fsdp_state()):  # type: ignore[operator]
        for held in group.fsdp_params:
            held.__class__ = kept if id(held.sharded_param) in chosen else beside


def gather_as_local(module: nn.Module, where: Callable[[nn.Module], bool]) -> None:
    """Let `fully_shard` gather, as plain tensors, parameters of the unit of `module` that were DTensors before it.

    They are this rank's part, and so are their gradients; shards stay DTensors. `where` tells of the modules that
    parameters are in.
    """
    for group in _param_groups(module._get_fsdp_state()):  # type: ignore[operator]
        for held in group.fsdp_params:
            if where(held._module_info.module):
                held.is_dtensor, held._unsharded_dtensor_spec = False, None


@cache
def _float32_classes() -> tuple[type, type]:
    """Return the classes of FSDP's parameters beside those that stay in float32, and of these."""
    import torch

    class Beside(NAMES["FSDPParam"].find()):  # type: ignore[misc]
        @property
        def unsharded_grad_data(self) -> torch.Tensor:
            return super().unsharded_grad_data.to(torch.float32)  # type: ignore[no-any-return]

    class Kept(Beside):
        def init_dtype_attrs(self, mp_policy: Any) -> None:
            super().init_dtype_attrs(mp_policy)
            self.param_dtype = None if self.orig_dtype == torch.float32 else torch.float32

    return Beside, Kept


def _param_groups(state: Any) -> list[Any]:
    """Return the groups of a state of FSDP, which has several from torch 2.12 on."""
    return list(getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]))


@contextmanager
def fsdp_in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, FSDP gathers, casts and reduces in float32 whatever its policies say; no gradient may outlive it."""
    import torch
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    states = _fsdp_states(model)
    before = [state._mp_policy for state in states]

    def use(policies: list[MixedPrecisionPolicy]) -> None:
        for module in modules:
            module.reshard()
        for state, policy in zip(states, policies, strict=True):
            state._mp_policy = policy
            for group in _param_groups(state):
                group.mp_policy = policy
                group._init_mp_dtypes()
                for held in group.fsdp_params:
                    # These stay between steps, without memory but with the dtype of before.
                    held.all_gather_outputs = []
                    vars(held).pop("_unsharded_param", None)

    use(
        [
            MixedPrecisionPolicy(
                param_dtype=torch.float32,
                reduce_dtype=torch.float32,
                output_dtype=torch.float32 if policy.output_dtype is not None else None,
                cast_forward_inputs=policy.cast_forward_inputs,
            )
            for policy in before
        ]
    )
    try:
        yield
    finally:
        use(before)


def forget_forwards(model: nn.Module) -> None:
    """Drop what FSDP has noted of forwards for the backward pass of each, where there will be none."""
    for state in _fsdp_states(model):
        state._comm_ctx.post_forward_order.clear()
        for group in _param_groups(state):
            group._post_forward_indices.clear()


def _fsdp_states(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    found = (module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
    return list({id(state): state for state in found}.values())


# ---- a dry step


def give_collectives_shapes() -> None:
    """Have collectives work on fake tensors, as the import of torch's own module for that does."""
    NAMES["fake_collectives"].find()


@contextmanager
def fsdp_stages_wrapped(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, FSDP calls `wrap(name, method)` in place of its methods of these names, on a group of parameters."""
    group = NAMES["FSDPParamGroup"].find()
    with ExitStack() as patches:
        for name in ("pre_forward", "pre_backward", "unshard", "wait_for_unshard", "post_backward"):
            patches.enter_context(mock.patch.object(group, name, wrap(name, getattr(group, name))))
        yield


@contextmanager
def shape_propagation_wrapped(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, DTensor asks for the shapes of an operation through `wrap(method)`."""
    propagator, name = NAMES["ShardingPropagator"].find(), "_propagate_tensor_meta_non_cached"
    with mock.patch.object(propagator, name, wrap(getattr(propagator, name))):
        yield


def written_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments that an operator changes, but not those that are only its outputs (`out=`).

    Fused optimizers declare gradients among them, but change those only to undo the scale of a loss.
    """
    for number, argument in enumerate(func._schema.arguments):
        if argument.is_write and not argument.kwarg_only and argument.name != "grads":
            yield args[number] if number < len(args) else kwargs.get(argument.name)


def fsdp_name(group: Any) -> str:
    """Return the FQN of the module whose parameters FSDP gathers together in `group`."""
    return group._module_fqn or ""


def sharded_parameters(group: Any) -> Iterator[tuple[Any, bool]]:
    """Yield this rank's part of each parameter of `group`, and whether it is kept in host memory."""
    for held in group.fsdp_params:
        yield held.sharded_param, held.offload_to_cpu


def unsharded_parameters(group: Any) -> Iterator[torch.Tensor]:
    """Yield the gathered parameters of `group` that are there."""
    for held in group.fsdp_params:
        whole = getattr(held, "_unsharded_param", None)
        if whole is not None:
            yield whole


# ---- records in files of torch's own checkpoints


def dcp_records() -> dict[str, Any]:
    """Return {name in a file: class} of the private records of DCP's metadata."""
    found = (NAMES[name] for name in ("StorageInfo", "StoragePrefix", "MEM_FORMAT_ENCODING"))
    return {private.where.replace(":", "."): private.find() for private in found}
