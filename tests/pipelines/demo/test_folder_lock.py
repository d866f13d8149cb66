"""A lock goes when its owner does: one that dies is waited for, one that lives is named."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.demo.folder_lock import FolderInUseError, folder_lock, write_owner

# Its child inherits the lock and lives longer than it, as the threads of a killed process may.
_OWNER = """
import fcntl, subprocess, sys
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[lock.fileno()], stdout=subprocess.DEVNULL)
print("locked", flush=True)
sys.stdin.read()
"""


def start_owner(path: Path, seconds: float) -> "subprocess.Popen[str]":
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(path), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
    path.write_text(str(owner.pid))
    return owner


@pytest.mark.slow
def test_a_lock_whose_owner_is_dead_but_not_yet_let_go_is_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    owner = start_owner(tmp_path / "lock", 2)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()

    with folder_lock(tmp_path / "lock"):
        pass
    assert f"process {owner.pid} is ending, waiting for its files" in capfd.readouterr().err


def test_files_that_stay_open_are_not_waited_for_without_end(tmp_path: Path) -> None:
    owner = start_owner(tmp_path / "lock", 5)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()

    with (
        pytest.raises(FolderInUseError, match=f"process {owner.pid}"),
        folder_lock(tmp_path / "lock", wait_seconds=0.2),
    ):
        pass


def test_an_owner_that_lives_is_named_and_not_waited_for_long(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "lock") as lock:
        write_owner(lock, os.getpid())
        start = time.monotonic()
        with pytest.raises(FolderInUseError) as error, folder_lock(tmp_path / "lock", wait_seconds=600):
            pass
        assert time.monotonic() - start < 60
    assert error.value.owner == str(os.getpid())


def test_the_lock_is_free_again_after_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with folder_lock(tmp_path / "lock") as lock:
            write_owner(lock, os.getpid())
            with pytest.raises(FolderInUseError), folder_lock(tmp_path / "lock", wait_seconds=0):
                pass
        assert (tmp_path / "lock").read_text() == str(os.getpid())
    with (tmp_path / "lock").open() as file:
        # Raises where somebody holds it.
        assert fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
