"""A function in a process of its own: what comes back of it, and who ends with whom."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dice_core.child_processes import ChildError, ChildKilledError, run_in_child


def test_a_function_runs_in_another_process_with_what_this_one_has_loaded(tmp_path: Path) -> None:
    told, loaded = tmp_path / "told", len(sys.modules)
    run_in_child(lambda: told.write_text(f"{os.getpid()} {os.getppid()} {len(sys.modules)}"))
    child, parent, modules = map(int, told.read_text().split())
    assert child != os.getpid() == parent
    assert modules >= loaded


def test_this_process_works_meanwhile(tmp_path: Path) -> None:
    """The function waits for what the block beside it does."""
    file, seen = tmp_path / "file", tmp_path / "seen"

    def wait() -> None:
        while not file.exists():
            time.sleep(0.01)
        seen.touch()

    run_in_child(wait, meanwhile=lambda: file.touch())
    assert seen.exists()


def test_an_error_comes_back_as_its_message_and_its_traceback_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("data: no prompts")

    with pytest.raises(ChildError, match=r"^data: no prompts$"):
        run_in_child(fail)
    assert "ValueError: data: no prompts" in capfd.readouterr().err


def test_an_error_of_any_length_ends_the_process() -> None:
    def fail() -> None:
        raise ValueError("x" * 1_000_000)

    with pytest.raises(ChildError, match=r"^x{10000}$"):
        run_in_child(fail)


def test_an_exit_code_is_an_error_too() -> None:
    with pytest.raises(ChildError, match="ended with exit code 3"):
        run_in_child(lambda: sys.exit(3))


def test_a_killed_process_is_told_by_its_signal() -> None:
    with pytest.raises(ChildKilledError, match="ended by SIGKILL") as caught:
        run_in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert caught.value.number == signal.SIGKILL


def test_an_error_of_this_process_ends_the_other_one(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def work() -> None:
        started.write_text(str(os.getpid()))
        time.sleep(600)

    def meanwhile() -> None:
        while not started.exists() or not started.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_child(work, meanwhile=meanwhile)
    assert not psutil.pid_exists(int(started.read_text()))


PROGRAM = """
import os, time
from dice_core.child_processes import run_in_child
def work():
    print(os.getpid(), flush=True)
    time.sleep(600)
run_in_child(work)
print("went on")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_this_process_ends_the_other_one(number: signal.Signals) -> None:
    """A pod is told to stop by SIGTERM; the one that kills it is seen by nobody."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.send_signal(number)
        assert process.wait(60) == -number
        assert process.stdout.read() == ""
    child.wait(60)
