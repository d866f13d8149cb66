"""What is copied in memory is written by the other process as it was, whatever its structure."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dice_core.training.checkpoint_files import CheckpointOwner
from dice_core.training.checkpoints import CheckpointStore
from dice_core.training.copies import Copies
from dice_core.training.staging import load_state

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path) -> Any:
    owner = CheckpointOwner("this", num_processes=1, num_nodes=1, deepspeed="none")
    made = CheckpointStore(str(tmp_path / "stored"), tmp_path / "machine", owner, Copies(tmp_path / "lock"))
    yield made
    made.close()


def written(store: CheckpointStore, folder: Path, step: int) -> Path:
    (folder / f"machine/checkpoint-{step}").mkdir(parents=True, exist_ok=True)
    store.save(step)
    store.wait()
    return folder / f"machine/checkpoint-{step}"


def test_tensors_are_a_safetensors_file(store: CheckpointStore, tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 7).to(torch.bfloat16),
        "turned": torch.arange(6.0).view(2, 3).T,
        "empty": torch.empty(0, 4),
    }
    store.stage_tensors(tensors, tmp_path / "machine/checkpoint-5/weights.safetensors")
    folder = written(store, tmp_path, 5)
    found = load_file(folder / "weights.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "theirs.safetensors")
    assert load_file(tmp_path / "theirs.safetensors").keys() == found.keys()


def test_a_state_is_what_it_was_when_it_was_copied(store: CheckpointStore, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.full((4,), 2.0)
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "step": 3, "names": ("a", None)}
    expected = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    store.stage_state(state, tmp_path / "machine/checkpoint-5/global/optimizer.pt")
    # Training goes on while another process writes.
    optimizer.step()
    found = load_state(written(store, tmp_path, 5) / "global/optimizer.pt")
    assert found["step"] == 3 and found["names"] == ("a", None)
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], expected)
    assert found["optimizer"]["state"][0]["step"].shape == ()


def test_the_memory_serves_one_checkpoint_after_another_and_grows(store: CheckpointStore, tmp_path: Path) -> None:
    for step, size in ((1, 10), (2, 1000), (3, 10)):
        for name in ("a", "b"):
            value = torch.full((size,), float(step))
            store.stage_tensors({name: value}, tmp_path / f"machine/checkpoint-{step}/{name}.safetensors")
        folder = written(store, tmp_path, step)
        for name in ("a", "b"):
            assert torch.equal(load_file(folder / f"{name}.safetensors")[name], torch.full((size,), float(step)))


def test_a_process_that_was_killed_is_told_and_the_next_checkpoint_has_another(
    store: CheckpointStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(store, tmp_path, 1)
    assert store._process is not None
    store._process.send_signal(signal.SIGSTOP)
    (tmp_path / "machine/checkpoint-2").mkdir()
    store.save(2)
    store._process.kill()
    store.wait()
    assert "checkpoint 2 is not stored, for the process that writes it has ended" in capsys.readouterr().err
    written(store, tmp_path, 3)
    assert (tmp_path / "stored/checkpoint-3/rank-0/manifest.json").exists()
