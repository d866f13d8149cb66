"""What NCCL has between nodes: RDMA devices, or ordinary sockets, with which ZeRO-3 waits for the network.

Read from the devices and libraries of the pod, before NCCL chooses. Loads no torch.
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

_DEVICES = Path("/sys/class/infiniband")
_PLUGIN = "libnccl-net.so"


def sockets_warning(num_nodes: int, devices: Path = _DEVICES) -> str:
    """Return why NCCL will take sockets between the nodes, and what to do; empty where it need not, or with one node.

    Args:
        num_nodes: that train together.
        devices: the kernel's folder of RDMA devices, those of EFA among them.
    """
    if num_nodes == 1:
        return ""
    found = sorted(devices.iterdir()) if devices.is_dir() else []
    if not found:
        return _warning(
            "the pod has no RDMA device",
            "ask for some (cluster.trainer_extra_resources, such as vpc.amazonaws.com/efa), or train on one node",
        )
    if all(_driver(device) == "efa" for device in found) and not _is_loadable(_plugins()):
        return _warning(
            "the pod has EFA devices, and NCCL's plugin for them is not in the image",
            "build the train image with make images EFA_INSTALLER=",
        )
    return ""


def _warning(reason: str, remedy: str) -> str:
    return f"between nodes NCCL will talk over sockets, for {reason}: training is many times slower; {remedy}"


def _driver(device: Path) -> str:
    link = device / "device" / "driver"
    return link.resolve().name if link.exists() else ""


def _plugins() -> list[str]:
    """Return the names that NCCL tries, the person's own first."""
    own = os.environ.get("NCCL_NET_PLUGIN", "")
    return [own, f"libnccl-net-{own}.so", _PLUGIN] if own else [_PLUGIN]


def _is_loadable(libraries: Iterable[str]) -> bool:
    for library in libraries:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False
