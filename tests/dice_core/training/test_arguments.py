"""What DeepSpeed is given."""

from typing import Any

import pytest

from dice_core.training.arguments import deepspeed_config
from dice_core.training.settings import TrainingConfig

pytestmark = pytest.mark.slow


def zero(**settings: Any) -> dict[str, Any]:
    config = deepspeed_config(TrainingConfig(deepspeed="zero3", global_batch_size=1, **settings), 1)
    assert config is not None
    return config


def test_optimizer_states_stay_where_the_weights_are_unless_the_cpu_is_asked_for(device: str) -> None:
    assert "offload_optimizer" not in zero()["zero_optimization"]
    offloaded = zero(offload_optimizer="cpu")
    assert offloaded["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": device == "cuda"}
    # DeepSpeed would otherwise put an optimizer of its own in place of torch's, and build it with a compiler.
    assert offloaded["zero_force_ds_cpu_optimizer"] is False
