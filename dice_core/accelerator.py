"""Where this process computes: on a GPU, or on the CPU where none was promised. Loads torch when it is asked."""

import math
import os
import sys
from collections.abc import Sequence
from typing import Literal

GPU_VARIABLE = "DICE_GPU"
"""Set in pods that ask for GPUs. One that sees none would compute for days what takes a GPU an hour."""


class AcceleratorError(RuntimeError):
    """A GPU was promised and none is seen. The message is one line."""


def device_type() -> Literal["cuda", "cpu"]:
    """Return the kind of device to compute on.

    Raises:
        AcceleratorError: GPU_VARIABLE is set, and torch can use no GPU.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    _refuse_cpu()
    return "cpu"


def require_promised_gpu() -> None:
    """Check that a GPU is there if one was promised, without touching it: CUDA must not begin before a fork.

    Raises:
        AcceleratorError: as device_type.
    """
    import torch

    if not torch.cuda.device_count():
        _refuse_cpu()


def free_bytes(devices: Sequence[str] = ()) -> dict[str, float]:
    """Return how much memory devices have left; a CPU's counts as endless.

    Args:
        devices: by default all GPUs that this process sees, or its CPU. Each that is asked begins to hold a context.

    Raises:
        AcceleratorError: as device_type.
    """
    import torch

    if device_type() == "cpu":
        return {"cpu": math.inf}
    devices = devices or [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return {device: float(torch.cuda.mem_get_info(device)[0]) for device in devices}


def num_gpus() -> int:
    """Return how many GPUs this process can see; 0 where torch is not loaded, for then it has computed on none."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.device_count()) if torch else 0


def _refuse_cpu() -> None:
    import torch

    if os.environ.get(GPU_VARIABLE):
        raise AcceleratorError(
            f"this pod asks for GPUs ({GPU_VARIABLE} is set), and torch {torch.__version__} can use none: check the "
            "node (nvidia-smi: its driver), its device plugin and the image; without the variable the CPU computes"
        )
