"""Where training runs. A backend starts the processes of a job, shows their output, and ends when they have ended.

The job is a JSON file in storage (training.TrainingJob), its result a manifest beside it: a backend carries neither
settings nor data, so that processes on this machine and pods on a cluster are started the same way. Loads no torch.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import IO

from dice_core.child_processes import end_with_parent
from dice_core.launch.backend import FinalError, LaunchError
from dice_core.launch.failure_report import find_cause
from dice_core.launch.settings import LaunchConfig
from dice_core.progress import doing, heard, log
from dice_core.training.job import ERROR, FINAL_ERROR

NUM_LAST_LINES = 12
STOP_SECONDS = 30.0
_TORCHRUN = "torchrun"
"""The name of its own lines."""
_RANK_LINE = re.compile(r"\[[a-z]+(\d+)\]:(.*)")


class TorchrunBackend:
    """Processes of this machine, started by torchrun: one for each GPU, or several on a CPU."""

    def __init__(self, module: str = "dice_core.training.worker") -> None:
        """Take the module that torchrun runs with the job's URI."""
        self._module = module

    def run(self, job_uri: str, launch: LaunchConfig) -> None:
        """See Backend."""
        log(f"train: {launch.processes_per_node} process(es) by torchrun")
        process = subprocess.Popen(
            self._command(job_uri, launch.processes_per_node),
            env=_environment(launch.processes_per_node),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A group of its own, so that Ctrl-C reaches it once, through us.
            start_new_session=True,
            # A killed launcher leaves no training behind that nobody watches.
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        )
        last_lines: dict[str, deque[str]] = {}
        with process, doing("waiting for its processes"), _signals_forwarded(process) as received:
            for line in process.stdout or ():
                _show(line, last_lines)
            exit_code = process.wait()
        if received:
            # What stopped us goes on to stop the caller, by its own handler.
            signal.raise_signal(received[0])
        if exit_code:
            is_final = any(line.startswith(FINAL_ERROR) for lines in last_lines.values() for line in lines)
            raise (FinalError if is_final else LaunchError)(_failure(job_uri, exit_code, last_lines))

    def _command(self, job_uri: str, num_processes: int) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        return [*torchrun, f"--nproc-per-node={num_processes}", "--tee=3", "--module", self._module, job_uri]


def _environment(num_processes: int) -> dict[str, str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # DeepSpeed's calls into torch would fill the log with deprecations.
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    # torchrun sets one thread for each of several processes and says so at length; the cores shared out are better.
    num_cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_processes)))
    # Where this package was found, the workers find it too: the current folder may be another one.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return environment


@contextmanager
def _signals_forwarded(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Tell the processes to stop on SIGTERM and SIGINT; kill those that have not ended some time later.

    They get SIGTERM in both cases: an interrupted Python would show where it was.

    Yields the signals received so far.
    """
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        _signal_group(process, signal.SIGTERM)
        timer = threading.Timer(STOP_SECONDS, _signal_group, (process, signal.SIGKILL))
        timer.daemon = True
        timer.start()

    # Python delivers signals to the main thread alone; a launcher in another thread is stopped by its own caller.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    # The group is torchrun alone: it hands SIGTERM and SIGINT on, and a worker ends with a torchrun that is killed.
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _show(line: str, last_lines: dict[str, deque[str]]) -> None:
    """Show what a process says, but its error, which ends the command, and what torchrun says of it at length."""
    match = _RANK_LINE.match(line)
    name = f"process {match[1]}" if match else _TORCHRUN
    text = match[2] if match else line.rstrip("\n")
    last_lines.setdefault(name, deque(maxlen=NUM_LAST_LINES)).append(text)
    is_told_later = name == _TORCHRUN or text.startswith((ERROR, FINAL_ERROR))
    if not is_told_later or os.environ.get("DICE_DEBUG"):
        _write(sys.stderr, line)
        heard()


def _write(stream: IO[str], line: str) -> None:
    stream.write(line)
    stream.flush()


def _failure(job_uri: str, exit_code: int, last_lines: Mapping[str, deque[str]]) -> str:
    workers = {name: lines for name, lines in last_lines.items() if name != _TORCHRUN} or last_lines
    lines_of_all = [line for lines in workers.values() for line in lines]
    # Of a process that was killed only torchrun tells.
    cause = find_cause(lines_of_all) or find_cause(last_lines.get(_TORCHRUN, ()))
    cause = cause or (lines_of_all[-1:] or ["no output"])[0]
    tail = [f"[{name}] {line}" for name, lines in sorted(workers.items()) for line in lines]
    return "\n".join([f"training failed, exit code {exit_code}: {cause} (job {job_uri})", *tail])
