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

from dice_core.training.activations import keep_fewer_activations

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


# Two layers, each with a gated MLP and, where the formula is Llama's, two norms (qwen3: four), and the last norm.
@pytest.mark.parametrize(
    ("family", "num_changed"), [("llama", 7), ("mistral", 7), ("qwen2", 7), ("qwen3", 11), ("gemma", 2), ("gemma2", 2)]
)
@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16])
def test_log_probs_are_the_same_to_the_bit_and_gradients_to_rounding(
    family: str, num_changed: int, autocast: torch.dtype
) -> None:
    model = model_of(family, **SIZES)
    lean = copy.deepcopy(model)
    assert keep_fewer_activations(lean) == num_changed
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


def test_a_model_that_is_built_in_another_way_stays_as_it_is() -> None:
    model = model_of("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    assert keep_fewer_activations(model) == 0
