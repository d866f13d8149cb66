"""The event file of a training in storage: as it grows, after a fault, and when training goes on from a checkpoint."""

from pathlib import Path

import pytest

from dice_core.storage.contract import StorageError
from dice_core.storage.folder import FolderStorage
from dice_core.tracking.event_file import read_events
from dice_core.tracking.feed import Line, TrackerError
from dice_core.tracking.tensorboard import EVENTS_FILE, FOLDER, TensorBoardFile


def stored(place: Path) -> list[tuple[int, float, float]]:
    """Return the steps of a stored file, with their losses and times."""
    data = (place / FOLDER / EVENTS_FILE).read_bytes()
    return [(event.step, event.values["loss"], event.time) for event in read_events(data)]


def line(step: int, loss: float, time: float) -> Line:
    return Line(step, {"loss": loss}, time)


def test_the_file_in_storage_grows_with_each_batch(tmp_path: Path) -> None:
    file = TensorBoardFile(str(tmp_path / "train"), tmp_path / "scratch")
    file.begin()
    file.send([line(0, 0.75, 10.0)])
    assert stored(tmp_path / "train") == [(0, 0.75, 10.0)]
    file.send([line(1, 0.5, 11.0), line(1, 0.25, 11.5)])
    assert stored(tmp_path / "train") == [(0, 0.75, 10.0), (1, 0.5, 11.0), (1, 0.25, 11.5)]


def test_what_a_fault_kept_from_storage_is_there_once_with_the_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TensorBoardFile(str(tmp_path / "train"), tmp_path / "scratch")
    file.begin()
    lines = [line(0, 0.75, 10.0), line(1, 0.5, 11.0)]

    def away(*_: object) -> None:
        raise StorageError("s3://bucket: no answer")

    with monkeypatch.context() as patch:
        patch.setattr(FolderStorage, "upload", away)
        with pytest.raises(TrackerError, match="no answer"):
            file.send(lines)
    file.send([*lines, line(2, 0.25, 12.0)])
    assert stored(tmp_path / "train") == [(0, 0.75, 10.0), (1, 0.5, 11.0), (2, 0.25, 12.0)]


def test_a_training_that_goes_on_has_the_curve_of_its_checkpoint_and_the_times_of_then(tmp_path: Path) -> None:
    place = str(tmp_path / "train")
    before = TensorBoardFile(place, tmp_path / "one")
    before.begin()
    before.send([line(step, 1.0, 10.0 + step) for step in range(4)])
    after = TensorBoardFile(place, tmp_path / "another machine")
    after.begin()
    # The checkpoint kept steps 0 and 1; what came after is trained again.
    after.send([line(0, 1.0, 100.0), line(1, 1.0, 100.0), line(2, 0.5, 101.0)])
    assert stored(tmp_path / "train") == [(0, 1.0, 10.0), (1, 1.0, 11.0), (2, 0.5, 12.0)]


def test_a_file_that_is_not_ours_is_written_over(tmp_path: Path) -> None:
    place = tmp_path / "train"
    (place / FOLDER).mkdir(parents=True)
    (place / FOLDER / EVENTS_FILE).write_bytes(b"something else that is longer than a header")
    file = TensorBoardFile(str(place), tmp_path / "scratch")
    file.begin()
    file.send([line(0, 0.5, 10.0)])
    assert stored(place) == [(0, 0.5, 10.0)]
