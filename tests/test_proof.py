"""Parameters that are gathered where an operation needs them: same values and gradients, little memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef

from ndtrain.proof.lazy import LazyParameter, Recent
from ndtrain.torch_compat import put_parameter
from tests.tiny import MATRIX


class Lazily:
    """Makes the parameters of a module lazy, and keeps what a backward pass gives them and how much was in memory."""

    def __init__(self, module: torch.nn.Module, limit: int):
        self.grads: dict[str, torch.Tensor | None] = {}
        self.most = 0
        self._alive: list[tuple[StorageWeakRef, int]] = []
        self._recent = Recent(limit)
        lazies: dict[torch.nn.Parameter, torch.Tensor] = {}
        for name, param in [*module.named_parameters(remove_duplicate=False)]:
            owner, _, own = name.rpartition(".")
            if param not in lazies:
                lazies[param] = self._lazy(name, param.detach())
            put_parameter(module.get_submodule(owner), own, lazies[param])  # type: ignore[arg-type]

    def _lazy(self, name: str, param: torch.Tensor) -> torch.Tensor:
        def fetch() -> torch.Tensor:
            return self._recent.get(name, param.numel(), lambda: self._gathered(param))

        lazy = LazyParameter(param.to("meta"), fetch, device=torch.device("cpu"), requires_grad=True)
        lazy.register_post_accumulate_grad_hook(lambda t: self.grads.__setitem__(name, t.grad))
        return lazy

    def _gathered(self, param: torch.Tensor) -> torch.Tensor:
        made = param.clone()
        self._alive.append((StorageWeakRef(made.untyped_storage()), made.numel()))
        self._alive = [(storage, numel) for storage, numel in self._alive if not storage.expired()]
        self.most = max(self.most, sum(numel for _, numel in self._alive))
        return made


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt2", "falcon_mamba", "gpt_oss"])
def test_lazy_parameters_give_what_others_give_in_the_memory_of_two_of_them(kind: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **MATRIX[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.arange(3, 35)[None]
    want = model(input_ids=ids, use_cache=False).logits
    want.square().sum().backward()
    right = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    limit = 2 * max(param.numel() for param in model.parameters())
    lazily = Lazily(model, limit)
    got = model(input_ids=ids, use_cache=False).logits
    got.square().sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert lazily.grads.keys() == right.keys()
    for name, grad in right.items():
        torch.testing.assert_close(lazily.grads[name], grad, rtol=1e-6, atol=1e-6)
    assert lazily.most <= limit < sum(grad.numel() for grad in right.values())
