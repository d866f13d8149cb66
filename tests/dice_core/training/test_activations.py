"""Less is kept for backward, and nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from dice_core.training.activations import keep_fewer_activations

pytestmark = pytest.mark.slow

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


def gradients(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=IDS).logits
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


# Two layers, each with two norms (qwen3: four), and the last norm.
@pytest.mark.parametrize(("family", "num_norms"), [("llama", 5), ("mistral", 5), ("qwen2", 5), ("qwen3", 9)])
@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16])
def test_log_probs_are_the_same_to_the_bit_and_gradients_to_rounding(
    family: str, num_norms: int, autocast: torch.dtype
) -> None:
    model = model_of(family, **SIZES)
    lean = copy.deepcopy(model)
    line = f"{num_norms} of {num_norms} norms and 2 of 2 MLPs keep fewer tensors for backward"
    assert keep_fewer_activations(lean) == line
    assert torch.equal(model(input_ids=IDS).logits, lean(input_ids=IDS).logits)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, lean(input_ids=IDS).logits)
    tolerance = 1e-5 if autocast == torch.float32 else 1e-2
    assert_close(gradients(lean, autocast), gradients(model, autocast), rtol=tolerance, atol=tolerance)


def test_weights_in_bfloat16_as_deepspeed_has_them_give_the_same_gradients_too() -> None:
    model = model_of("llama", **SIZES).bfloat16()
    lean = copy.deepcopy(model)
    keep_fewer_activations(lean)
    assert_close(gradients(lean), gradients(model), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("is_lean", [False, True])
def test_products_and_normalised_inputs_are_gone_when_the_forward_is_done(is_lean: bool) -> None:
    model = model_of("llama", **SIZES)
    if is_lean:
        keep_fewer_activations(model)
    with _Results(torch.ops.aten.silu.default, torch.ops.aten.mul.Tensor) as results:
        logits = model(input_ids=IDS).logits
    gc.collect()
    shapes = [shape for shape, storage in results.found if storage() is not None]
    assert (shapes.count((1, 6, 48)), logits.requires_grad) == (0 if is_lean else 4, True)
    # What a norm returns goes into projections, which keep it.
    assert shapes.count((1, 6, 32)) == (5 if is_lean else 10)


class _Results(TorchDispatchMode):
    """Notes what operators return, without keeping it."""

    def __init__(self, *operators: object) -> None:
        super().__init__()
        self.operators, self.found = operators, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator in self.operators:
            self.found.append((tuple(result.shape), weakref.ref(result.untyped_storage())))
        return result


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
    keep_fewer_activations(model)
    with _Products() as after:
        gradients(model)
    assert after.num == before.num > 0


def test_a_model_of_other_classes_stays_as_it_is_and_is_named() -> None:
    model = model_of("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    line = "0 of 5 norms and 0 of 2 MLPs keep fewer tensors for backward (the other classes of gpt2 are unknown here, "
    assert keep_fewer_activations(model) == f"{line}so it needs more memory)"
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_subclass_may_compute_something_else_and_stays_as_it_is() -> None:
    class DoubledMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = model_of("llama", **SIZES)
    model.model.layers[0].mlp = DoubledMLP(model.config)
    before = model(input_ids=IDS).logits
    assert keep_fewer_activations(model).startswith("5 of 5 norms and 1 of 2 MLPs")
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_what_is_made_again_drops_the_same_inputs_of_an_adapter() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def of_adapters(keep_fewer: bool) -> dict[str, Tensor]:
        model = model_of("llama", **SIZES)
        torch.manual_seed(0)
        linear = ["gate_proj", "up_proj", "down_proj"]
        inject_adapter_in_model(
            LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False, target_modules=linear), model
        )
        if keep_fewer:
            keep_fewer_activations(model)
        model.train()
        torch.manual_seed(1)
        model(input_ids=IDS).logits.square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    before, after = of_adapters(False), of_adapters(True)
    assert before.keys() == after.keys() and len(before) == 12
    for name, gradient in before.items():
        assert_close(after[name], gradient, msg=name)
