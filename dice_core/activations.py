"""What a forward keeps for its backward: less than autograd would, for the price of a product of numbers it has.

Recomputing whole layers is transformers' gradient checkpointing, a setting of training; this is for where that is off.
"""

import functools
import inspect

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# How transformers writes the gated MLP of Llama, Mistral, Qwen, Gemma and most others.
_GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"


def recompute_gated_products(model: nn.Module) -> int:
    """Let every gated MLP keep its two inner projections alone; activation and product are made again in backward.

    Of what a layer keeps these are a quarter (SmolLM2-135M, float32). The recomputation runs no matrix product: it ends
    where the last tensor that backward needs is there. Results and gradients stay the same to the bit.

    Returns:
        How many modules were changed; 0 for a model that is built in another way.
    """
    gated = [module for module in model.modules() if _is_gated(type(module))]
    for module in gated:
        module.forward = functools.partial(_forward, module)
    return len(gated)


@functools.cache
def _is_gated(kind: type[nn.Module]) -> bool:
    try:
        return _GATED in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if not torch.is_grad_enabled():
        return _project(mlp, gate, up)
    return checkpoint(_project, mlp, gate, up, use_reentrant=False, preserve_rng_state=False)


def _project(mlp: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    projected: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
    return projected
