"""Which checkpoints a run keeps and finds where others of earlier attempts lie; small files, no model."""

import time
from pathlib import Path

import pytest

from dice_core.training.checkpoint_files import CheckpointOwner
from dice_core.training.checkpoints import CheckpointStore
from dice_core.training.copies import Copies

THIS = CheckpointOwner("this", num_processes=1, num_nodes=1, deepspeed="zero3")


def save(folder: Path, owner: CheckpointOwner, *steps: int, node: int = 0) -> None:
    """Write checkpoints on a machine of their own, as the trainer of that run would, and copy them to storage."""
    machine = folder / f"machine-{owner.fingerprint}-{owner.num_processes}-{node}"
    store = store_of(folder / "stored", machine, owner)
    for step in steps:
        write(store, machine, owner, step, node)
    store.close()


def store_of(stored: Path | str, machine: Path, owner: CheckpointOwner) -> CheckpointStore:
    return CheckpointStore(str(stored), machine, owner, Copies(machine.with_name(f"{machine.name}.lock")))


def write(store: CheckpointStore, machine: Path, owner: CheckpointOwner, step: int, node: int = 0) -> None:
    (machine / f"checkpoint-{step}").mkdir(parents=True)
    (machine / f"checkpoint-{step}/weights-{node}").write_text(f"{owner} {step}")
    store.save(step)
    store.wait()


def newest(folder: Path, owner: CheckpointOwner) -> Path | None:
    """Return what a machine that has nothing itself goes on from."""
    return store_of(folder / "stored", folder / "new-machine", owner).newest()


@pytest.mark.parametrize(
    "other",
    [
        CheckpointOwner("that", num_processes=1, num_nodes=1, deepspeed="zero3"),
        CheckpointOwner("this", num_processes=4, num_nodes=1, deepspeed="zero3"),
    ],
)
def test_later_checkpoints_of_another_run_do_not_displace_this_runs(tmp_path: Path, other: CheckpointOwner) -> None:
    save(tmp_path, other, 150, 200)
    save(tmp_path, THIS, 50)
    assert newest(tmp_path, THIS) == tmp_path / "new-machine/checkpoint-50"
    save(tmp_path, THIS, 100)
    assert newest(tmp_path, THIS) == tmp_path / "new-machine/checkpoint-100"


def test_only_the_newest_is_kept_and_those_of_another_run_go_when_passed(tmp_path: Path) -> None:
    save(tmp_path, CheckpointOwner("that", num_processes=1, num_nodes=1, deepspeed="zero3"), 60, 400)
    save(tmp_path, THIS, 50, 100, 150)
    kept = sorted(int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "stored").iterdir())
    assert kept == [150, 400]


@pytest.mark.parametrize("node", [0, 1])
def test_a_disk_has_one_finished_checkpoint_and_the_one_that_is_written(
    node: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(node))
    monkeypatch.setenv("GROUP_RANK", str(node))
    owner = CheckpointOwner("this", num_processes=2, num_nodes=2, deepspeed="zero3")
    machine = tmp_path / "machine"
    store = store_of(tmp_path / "stored", machine, owner)
    for step in (50, 100):
        write(store, machine, owner, step, node)
        assert len(list(machine.iterdir())) <= 2
        store.delete_older()
        while len(list(machine.iterdir())) > 1:
            time.sleep(0.01)
    assert [path.name for path in machine.iterdir()] == ["checkpoint-100"]
    store.close()


def test_another_runs_files_at_the_same_step_are_not_counted_as_this_runs(tmp_path: Path) -> None:
    save(tmp_path, CheckpointOwner("that", num_processes=2, num_nodes=1, deepspeed="zero3"), 50)
    (tmp_path / "stored/checkpoint-50/rank-0/shard-of-process-1").write_text("left over")
    save(tmp_path, THIS, 50)
    assert not (tmp_path / "stored/checkpoint-50/rank-0/shard-of-process-1").exists()
    found = newest(tmp_path, THIS)
    assert found is not None and [path.name for path in found.iterdir()] == ["weights-0"]


def test_a_checkpoint_of_two_nodes_counts_when_both_parts_are_there_and_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = CheckpointOwner("this", num_processes=2, num_nodes=2, deepspeed="zero3")
    that = CheckpointOwner("that", num_processes=2, num_nodes=2, deepspeed="zero3")

    def save_node(node: int, owner: CheckpointOwner, *steps: int) -> None:
        monkeypatch.setenv("RANK", str(node))
        monkeypatch.setenv("GROUP_RANK", str(node))
        save(tmp_path, owner, *steps, node=node)
        monkeypatch.setenv("RANK", "0")

    save_node(1, that, 100)
    save_node(0, this, 50)
    assert newest(tmp_path, this) is None
    save_node(1, this, 50)
    # The first node is ahead: it keeps what both can go on from.
    save_node(0, this, 100)
    assert newest(tmp_path, this) == tmp_path / "new-machine/checkpoint-50"
    save_node(1, this, 100)
    assert newest(tmp_path, this) == tmp_path / "new-machine/checkpoint-100"


def test_the_trainers_folder_holds_what_is_gone_on_from_alone(tmp_path: Path) -> None:
    save(tmp_path, THIS, 50, 100)
    machine = tmp_path / "machine-this-1-0"
    (machine / "checkpoint-150").mkdir()  # cut off before it was complete
    store = store_of(tmp_path / "stored", machine, THIS)
    assert store.newest() == machine / "checkpoint-100"
    assert [path.name for path in machine.iterdir()] == ["checkpoint-100"]
    more = CheckpointOwner("this", num_processes=2, num_nodes=1, deepspeed="zero3")
    assert store_of(tmp_path / "stored", machine, more).newest() is None
    assert not list(machine.iterdir())


def test_a_copy_that_fails_is_told_and_the_next_checkpoint_is_stored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    machine, stored = tmp_path / "machine", tmp_path / "stored"
    stored.write_text("a file where a folder is needed")
    store = store_of(stored, machine, THIS)
    write(store, machine, THIS, 50)
    store.wait()
    stored.unlink()
    write(store, machine, THIS, 100)
    store.wait()
    assert newest(tmp_path, THIS) == tmp_path / "new-machine/checkpoint-100"
    said = capfd.readouterr().err
    assert said.count("checkpoint 50 is not stored, training goes on and stores the next one: ") == 1
    assert "checkpoint 100 is not stored" not in said


@pytest.mark.slow
def test_a_finished_training_whose_store_went_away_ends_well_and_says_what_stays(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(f"{s3}/stays", tmp_path / "machine", THIS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store.delete_all()
    assert "the checkpoints of the finished training stay in storage: " in capsys.readouterr().err
