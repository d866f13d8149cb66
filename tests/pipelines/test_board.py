"""`make board`: the copies of curves that TensorBoard reads, and a real TensorBoard that serves them."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dice_core.settings.base import ConfigError
from dice_core.storage.contract import StorageError
from dice_core.tracking.feed import Line
from dice_core.tracking.tensorboard import EVENTS_FILE, TensorBoardFile
from pipelines.board import CurveCopies, serve
from tests.mlflow_server import ROOT, free_port, python_of

PLACE = "iteration-1/train"


def write(root: Path, run: str, scratch: Path, losses: list[float]) -> TensorBoardFile:
    """Let a training of a run write a curve."""
    file = TensorBoardFile(f"{root}/runs/{run}/{PLACE}", scratch)
    file.begin()
    file.send([Line(step, {"loss": loss}, 100.0 + step) for step, loss in enumerate(losses)])
    return file


def test_a_curve_that_grew_is_appended_to_in_place_and_one_begun_anew_is_replaced(tmp_path: Path) -> None:
    """TensorBoard holds the file open and would see nothing of another one in its place."""
    copies = CurveCopies(str(tmp_path), "", tmp_path / "copies")
    file = write(tmp_path, "a", tmp_path / "one", [0.75])
    copies.update()
    path = tmp_path / "copies" / "a" / PLACE / EVENTS_FILE
    stored = tmp_path / "runs" / "a" / PLACE / "tensorboard" / EVENTS_FILE
    inode, size = path.stat().st_ino, path.stat().st_size
    file.send([Line(1, {"loss": 0.5}, 101.0)])
    copies.update()
    assert path.stat().st_ino == inode and path.stat().st_size > size
    assert path.read_bytes() == stored.read_bytes()
    write(tmp_path, "a", tmp_path / "two", [0.25])
    stored.write_bytes(stored.read_bytes().replace(b"loss", b"less"))
    copies.update()
    assert path.read_bytes() == stored.read_bytes()
    assert [found.name for found in path.parent.iterdir()] == [EVENTS_FILE]


def test_one_run_or_all_are_copied_and_what_is_deleted_goes(tmp_path: Path) -> None:
    for run in ("a", "ab"):
        write(tmp_path, run, tmp_path / run, [0.75])
    one, everything = (CurveCopies(str(tmp_path), run, tmp_path / f"copies-{run}") for run in ("a", ""))
    one.update()
    everything.update()
    assert (one.num_files, everything.num_files) == (1, 2)
    (tmp_path / "runs" / "ab" / PLACE / "tensorboard" / EVENTS_FILE).unlink()
    everything.update()
    assert everything.num_files == 1 and not list((tmp_path / "copies-" / "ab").rglob(EVENTS_FILE))


def test_a_run_that_left_nothing_is_named_and_one_without_curves_yet_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "runs" / "begun" / "data").mkdir(parents=True)
    (tmp_path / "runs" / "begun" / "data" / "manifest.json").write_text("{}")
    copies = CurveCopies(str(tmp_path), "begun", tmp_path / "copies")
    copies.update()
    copies.require_run()
    missing = CurveCopies(str(tmp_path), "begn", tmp_path / "others")
    missing.update()
    with pytest.raises(ConfigError, match="nothing of run 'begn' is at"):
        missing.require_run()
    with pytest.raises(ValueError, match="run must be"):
        CurveCopies(str(tmp_path), "No/Run", tmp_path / "others")


def test_the_board_outlives_a_storage_that_is_away(capfd: pytest.CaptureFixture[str]) -> None:
    tries: list[int] = []

    def update() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise StorageError("s3://bucket: no answer")
        process.kill()

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with process:
        assert serve(process, update, seconds=0.01) == -9
    assert len(tries) >= 2
    assert "the curves shown are those of before: s3://bucket: no answer" in capfd.readouterr().err


@pytest.mark.slow
def test_a_real_tensorboard_shows_the_curve_and_what_is_added_to_it(s3: str, tmp_path: Path) -> None:
    file = TensorBoardFile(f"{s3}/runs/zephyr-1/{PLACE}", tmp_path / "scratch")
    file.begin()
    file.send([Line(step, {"loss": loss, "rewards/margins": 1.5}, 100.0) for step, loss in enumerate([0.75, 0.5])])
    port, python = free_port(), python_of(ROOT / "requirements" / "board.lock")
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "board",
        "--run=zephyr-1",
        f"--root={s3}",
        f"--port={port}",
        "--seconds=1",
    ]
    command += [f"--python={python}", f"--folder={tmp_path / 'copies'}"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            assert points(port, "loss", 2) == [(0, 0.75), (1, 0.5)]
            assert points(port, "rewards/margins", 2) == [(0, 1.5), (1, 1.5)]
            file.send([Line(2, {"loss": 0.25}, 101.0)])
            assert points(port, "loss", 3) == [(0, 0.75), (1, 0.5), (2, 0.25)]
        finally:
            process.terminate()


def points(port: int, tag: str, num_points: int) -> list[tuple[int, float]]:
    """Wait until TensorBoard has so many points of a curve, and return their steps and values."""
    query = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=zephyr-1/{PLACE}&tag={tag}"
    deadline, found = time.monotonic() + 180, None
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(query, timeout=10) as answer:
                found: Any = json.load(answer)
            if len(found) >= num_points:
                return [(step, value) for _, step, value in found]
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"no {num_points} points of {tag}: {found}")
