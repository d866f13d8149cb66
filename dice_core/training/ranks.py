"""The processes of one training, as torchrun's environment and torch.distributed know them.

Every function also works in a single process without a process group.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dice_core.accelerator import device_type


def num_processes() -> int:
    """Return how many processes train together, over all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its node, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_local() -> int:
    """Return how many processes train on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(num_processes())))


def num_nodes() -> int:
    """Return how many machines train together."""
    return num_processes() // num_local()


def node_rank() -> int:
    """Return the number of this process's node, from 0."""
    return int(os.environ.get("GROUP_RANK", "0"))


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Return process 0's value in every process."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather(value: Any) -> list[Any]:
    """Return every process's value, in order of rank, in every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """Return the sum over all processes, in every process. Any shape."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def close() -> None:
    """Leave the process group, so that the process ends without a warning or a hang."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """Return where this process computes."""
    return torch.device("cuda", local_rank()) if device_type() == "cuda" else torch.device("cpu")
