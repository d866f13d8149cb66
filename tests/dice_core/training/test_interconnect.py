"""Whether training on several nodes says that the network between them is slow."""

from pathlib import Path

import pytest

from dice_core.training.interconnect import sockets_warning


def device(folder: Path, name: str, driver: str) -> None:
    drivers = folder / "drivers" / driver
    drivers.mkdir(parents=True, exist_ok=True)
    place = folder / "infiniband" / name / "device"
    place.mkdir(parents=True)
    (place / "driver").symlink_to(drivers)


def test_one_node_needs_no_network(tmp_path: Path) -> None:
    assert sockets_warning(1, tmp_path / "infiniband") == ""


def test_two_nodes_without_a_device_are_told_what_to_ask_for(tmp_path: Path) -> None:
    warning = sockets_warning(2, tmp_path / "infiniband")
    assert "the pod has no RDMA device" in warning and "cluster.trainer_extra_resources" in warning


def test_efa_without_its_plugin_is_told_how_to_build_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(tmp_path, "rdmap0s6", "efa")
    monkeypatch.setenv("NCCL_NET_PLUGIN", "none-of-that-name")
    assert "make images EFA_INSTALLER=" in sockets_warning(2, tmp_path / "infiniband")


def test_efa_with_a_plugin_and_infiniband_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(tmp_path, "rdmap0s6", "efa")
    monkeypatch.setenv("NCCL_NET_PLUGIN", "libc.so.6")
    assert sockets_warning(2, tmp_path / "infiniband") == ""
    monkeypatch.delenv("NCCL_NET_PLUGIN")
    device(tmp_path, "mlx5_0", "mlx5_core")
    assert sockets_warning(2, tmp_path / "infiniband") == "", "NCCL speaks InfiniBand by itself"
