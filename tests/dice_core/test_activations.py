"""Less is kept for backward, and nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dice_core.activations import recompute_gated_products

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IDS = torch.tensor([[1, 5, 9, 33, 2, 17]])


def model_of(family: str, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS).logits.log_softmax(-1)[..., 3].sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_gradients_are_the_same_to_the_bit(family: str) -> None:
    model = model_of(family, **SIZES)
    lean = copy.deepcopy(model)
    assert recompute_gated_products(lean) == 2
    expected, found = gradients(model), gradients(lean)
    assert {name for name, value in expected.items() if not torch.equal(value, found[name])} == set()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, lean(input_ids=IDS).logits)


@pytest.mark.parametrize("is_lean", [False, True])
def test_the_product_is_gone_when_the_forward_is_done(is_lean: bool) -> None:
    model, products = model_of("llama", **SIZES), []
    if is_lean:
        recompute_gated_products(model)

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        products.append(weakref.ref(inputs[0].untyped_storage()))

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(watch)
    logits = model(input_ids=IDS).logits
    gc.collect()
    assert [product() is None for product in products] == [is_lean, is_lean]
    assert logits.requires_grad


class _Products(TorchDispatchMode):
    """Counts matrix products that are computed."""

    num = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.num += operator is torch.ops.aten.mm.default
        return operator(*args, **(kwargs or {}))


def test_no_matrix_product_runs_again() -> None:
    model = model_of("llama", **SIZES)
    with _Products() as before:
        gradients(model)
    recompute_gated_products(model)
    with _Products() as after:
        gradients(model)
    assert after.num == before.num > 0


def test_a_model_that_is_built_in_another_way_stays_as_it_is() -> None:
    model = model_of("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    assert recompute_gated_products(model) == 0
