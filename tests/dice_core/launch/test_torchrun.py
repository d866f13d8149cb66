"""Starting processes by torchrun, and what a person learns when one fails. The workers are a few lines, no model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dice_core.launch.backend import FinalError, LaunchError
from dice_core.launch.settings import LaunchConfig
from dice_core.launch.torchrun import TorchrunBackend

pytestmark = pytest.mark.slow

_REPOSITORY = Path(__file__).parents[3]

_WORKER = """
import os, signal, sys, time
from pathlib import Path

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
print(f"rank {rank} of {os.environ['WORLD_SIZE']} at work", flush=True)
BODY
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return a function that makes a module of a worker's last lines, and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(body: str) -> str:
        (tmp_path / "launched_worker.py").write_text(_WORKER.replace("BODY", body))
        return "launched_worker"

    return make


def test_every_process_is_started_and_its_output_is_shown_with_its_rank(
    worker: Callable[[str], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    TorchrunBackend(worker("")).run(str(tmp_path), LaunchConfig(processes_per_node=2))
    shown = capfd.readouterr().err
    assert "[default0]:rank 0 of 2 at work" in shown
    assert "[default1]:rank 1 of 2 at work" in shown


def test_a_failed_process_is_an_error_with_its_cause_exit_code_and_last_lines(
    worker: Callable[[str], str], tmp_path: Path
) -> None:
    body = 'time.sleep(1)\nif rank == "1":\n    print("error: the disk is full")\n    sys.exit(1)\ntime.sleep(60)'
    with pytest.raises(LaunchError) as caught:
        TorchrunBackend(worker(body)).run(str(tmp_path), LaunchConfig(processes_per_node=2))
    first, *lines = str(caught.value).splitlines()
    assert first == f"training failed, exit code 1: the disk is full (job {tmp_path})"
    assert "[process 0] rank 0 of 2 at work" in lines
    assert "[process 1] error: the disk is full" in lines


def test_the_error_of_the_processes_is_told_once_and_torchruns_banner_not_at_all(
    worker: Callable[[str], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = 'print("error: the disk is full", file=sys.stderr, flush=True)\nsys.exit(1)'
    with pytest.raises(LaunchError, match="exit code 1: the disk is full"):
        TorchrunBackend(worker(body)).run(str(tmp_path), LaunchConfig(processes_per_node=2))
    lines = [line for line in capfd.readouterr().err.splitlines() if "at work" not in line]
    assert len(lines) == 1 and lines[0].endswith("train: 2 process(es) by torchrun")


def test_of_a_process_that_was_killed_the_signal_is_the_cause(worker: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"exit code 1: Signal 9 \(SIGKILL\)"):
        TorchrunBackend(worker("os.kill(os.getpid(), 9)")).run(str(tmp_path), LaunchConfig())


def test_a_failure_that_every_try_would_meet_is_told_as_such(worker: Callable[[str], str], tmp_path: Path) -> None:
    body = 'print("{}error: the loss is not finite")\nsys.exit(1)'
    with pytest.raises(FinalError, match="exit code 1: the loss is not finite"):
        TorchrunBackend(worker(body.format("final "))).run(str(tmp_path), LaunchConfig())
    with pytest.raises(LaunchError) as caught:
        TorchrunBackend(worker(body.format(""))).run(str(tmp_path), LaunchConfig())
    assert not isinstance(caught.value, FinalError)


def test_an_uncaught_exception_is_the_cause(worker: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="exit code 1: ZeroDivisionError: division by zero"):
        TorchrunBackend(worker("1 / 0")).run(str(tmp_path), LaunchConfig())


_SLOW = """
signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath("stopped").touch(), sys.exit(1)))
folder.joinpath("pid").write_text(str(os.getpid()))
time.sleep(60)
"""


def _start_launcher(module: str, folder: Path, job: str = "") -> subprocess.Popen[bytes]:
    code = (
        "from dice_core.launch.torchrun import TorchrunBackend; from dice_core.launch.settings import LaunchConfig;"
        f"TorchrunBackend({module!r}).run({str(folder / job)!r}, LaunchConfig())"
    )
    path = os.pathsep.join([str(folder), str(_REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})


def _wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def _worker_pid(folder: Path) -> int:
    _wait_until(lambda: (folder / "pid").exists() and bool((folder / "pid").read_text()))
    return int((folder / "pid").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_stop_reaches_the_workers_as_sigterm_and_stops_the_launcher(
    number: signal.Signals, worker: Callable[[str], str], tmp_path: Path
) -> None:
    launcher = _start_launcher(worker(_SLOW), tmp_path)
    pid = _worker_pid(tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(timeout=120) == -number
    assert (tmp_path / "stopped").exists()
    assert not _is_running(pid)


def test_workers_do_not_outlive_a_killed_launcher(worker: Callable[[str], str], tmp_path: Path) -> None:
    launcher = _start_launcher(worker(_SLOW), tmp_path)
    pid = _worker_pid(tmp_path)
    assert _is_running(pid)
    launcher.kill()
    assert launcher.wait() == -signal.SIGKILL
    _wait_until(lambda: not _is_running(pid))
    assert not _is_running(pid)


def _is_read(fifo: Path) -> bool:
    """Return whether a process waits for what is written there. The end opened here is kept open: it waits on."""
    try:
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    return True


def test_the_workers_of_training_do_not_outlive_a_killed_torchrun(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    os.mkfifo(job)
    launcher = _start_launcher("dice_core.training.worker", tmp_path, job.name)
    try:
        _wait_until(lambda: _is_read(job))
        (torchrun,) = psutil.Process(launcher.pid).children()
        workers = torchrun.children()
        torchrun.kill()
        gone, alive = psutil.wait_procs(workers, timeout=60)
        for process in alive:
            process.kill()
        assert gone and not alive
        assert launcher.wait(timeout=120) == 1
    finally:
        launcher.kill()
