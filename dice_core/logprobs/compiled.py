"""FlexAttention compiled, or an error: uncompiled it holds the scores of all tokens by all tokens, and is only slow.

torch compiles it anew for each kind of row and of pass (the first length, then any; with gradient, without; layers done
anew for backward; autocast). Beyond a limit torch only warns and runs it uncompiled. Here that is an error.
"""

from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from dice_core.models.files import ModelError

FLEX = "flex_attention"
"""Its name among transformers' kernels, which `flex_attention` below stands for."""
COMPILE_LIMIT = 32
"""Kinds in one process. Training makes 8 at most, two for each of: a reference of its own, a pass without gradient, one
with, and layers done anew (a test counts them). Scoring makes two on each of the 8 GPUs that a model is spread over.
torch's own limit is 8."""


def use_flex_attention(model: PreTrainedModel) -> None:
    """Switch a model to FlexAttention, and let torch refuse to run it uncompiled in this process."""
    dynamo.recompile_limit = COMPILE_LIMIT
    dynamo.fail_on_recompile_limit_hit = True
    model.set_attn_implementation(FLEX)


def flex_attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' FlexAttention does, whose arguments and results it has.

    Raises:
        ModelError: torch has reached its limit of compilations.
    """
    try:
        attended: tuple[Tensor, Tensor | None] = flex_attention_forward(module, *args, **kwargs)
        return attended
    except FailOnRecompileLimitHit:
        raise ModelError(
            f"{type(module).__name__}: FlexAttention has been compiled {dynamo.recompile_limit} times in this process, "
            "for as many kinds of rows or passes, and would go on uncompiled (torch._dynamo.config.recompile_limit): "
            "set the environment variable TORCH_LOGS=recompiles, run again, and report what differs each time"
        ) from None


AttentionInterface.register(FLEX, flex_attention)
