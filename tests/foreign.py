"""A Llama whose feed-forward parts are not transformers' own: what TransformerEngine's modules have and Linear has not.

Importing this registers model type "foreign". `Opaque.unpickled` counts how often a saved state was unpickled.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers import initialization
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

GROUPS = 3


class Grouped(nn.Module):
    """Each group of features has matrices of its own, in grouped weights `[G, out, in]`; its state is data."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(GROUPS, 2 * inner, hidden // GROUPS))
        self.down = nn.Parameter(torch.empty(GROUPS, hidden // GROUPS, inner))
        self.bias = nn.Parameter(torch.empty(0))
        self.unused = nn.Parameter(torch.empty(0, 7))
        self.state = [0.0, 1.0]  # steps and a scale

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.state = [self.state[0] + 1, self.state[1] / 2]
        grouped = x.unflatten(-1, (GROUPS, -1))
        gate, up = torch.einsum("...gi,goi->...go", grouped, self.gate_up).chunk(2, -1)
        out = torch.einsum("...gi,goi->...go", nn.functional.silu(gate) * up, self.down)
        return out.flatten(-2) + self.bias.sum()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.state, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.state = state.tolist()


class Opaque(nn.Module):
    """State is a tensor of pickled bytes, as TransformerEngine has it; empty before the first step."""

    unpickled = 0

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += torch.is_grad_enabled()
        return x

    def get_extra_state(self) -> Tensor:
        data = pickle.dumps(self.steps) if self.steps else b""
        return torch.tensor(list(data), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel():
            Opaque.unpickled += 1
            self.steps = pickle.loads(bytes(state.tolist()))


class SelfCut(nn.Module):
    """Cuts its weights itself once it is given a mesh, and speaks with the other ranks itself."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(inner, hidden))
        self.down = nn.Parameter(torch.empty(hidden, inner))

    def set_device_mesh(self, tp_mesh: Any = None, weight_mesh: Any = None) -> None:
        for name, dim in (("up", 0), ("down", 1)):
            whole = self.get_parameter(name)
            local = distribute_tensor(whole.detach(), tp_mesh, [Shard(dim)], src_data_rank=None).to_local()
            cut = DTensor.from_local(
                local, tp_mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            setattr(self, name, nn.Parameter(cut))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up, self.down
        if not isinstance(up, DTensor):
            return nn.functional.linear(nn.functional.relu(nn.functional.linear(x, up)), down)
        mesh = up.device_mesh
        shared = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        local = shared.to_local(grad_placements=[Partial()])
        inner = nn.functional.relu(nn.functional.linear(local, up.to_local()))
        part = DTensor.from_local(nn.functional.linear(inner, down.to_local()), mesh, [Partial()], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local()


class ForeignMLP(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.grouped = Grouped(config.hidden_size, config.intermediate_size)
        self.opaque = Opaque()
        self.own = SelfCut(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.opaque(self.grouped(x)) + self.own(x)


class ForeignConfig(transformers.LlamaConfig):
    model_type = "foreign"
    base_model_tp_plan = {  # noqa: RUF012 - as transformers has it
        **{k: v for k, v in transformers.LlamaConfig.base_model_tp_plan.items() if ".mlp" not in k},
        "layers.*.mlp.grouped.gate_up": "packed_colwise",
        "layers.*.mlp.grouped.down": "rowwise",
        "layers.*.mlp.grouped": "moe_tp_experts",
        "layers.*.mlp.own.up": "colwise",
        "layers.*.mlp.own.down": "rowwise",
    }


class ForeignPreTrainedModel(LlamaPreTrainedModel):
    config_class = ForeignConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Grouped | SelfCut):
            for param in module.parameters(recurse=False):
                initialization.normal_(param, std=0.1)


class ForeignModel(ForeignPreTrainedModel, LlamaModel):
    def __init__(self, config: Any):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = ForeignMLP(config)
        self.post_init()


class ForeignForCausalLM(ForeignPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: Any):
        super().__init__(config)
        self.model = ForeignModel(config)
        self.post_init()


transformers.AutoConfig.register("foreign", ForeignConfig)
transformers.AutoModelForCausalLM.register(ForeignConfig, ForeignForCausalLM)

CONFIG = {
    "vocab_size": 261,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
