"""Runs sections one after another, each in a process of its own and with a time of its own, and says what each showed.

A section that fails or takes too long is ended, with all that it started, and the next one begins.
"""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

ROOT = Path(__file__).parents[2]
_LEAST_SECONDS = 30.0
"""With less time left a section is not begun: imports and the making of a model take as long."""
_END_SECONDS = 10.0
"""For a section that is told to end."""


@dataclass(frozen=True)
class Section:
    """What is run, and what it needs.

    Attributes:
        name: one word.
        seconds: it may take at most.
        packages: distributions it needs beside torch.
        command: from the file that its numbers go to, as JSON.
    """

    name: str
    seconds: float
    packages: Sequence[str]
    command: Callable[[Path], Sequence[str]]


@dataclass(frozen=True)
class Outcome:
    """How a section ended. `showed` is its last line where it has no numbers, or why it did not pass."""

    section: str
    result: Literal["passed", "failed", "out of time", "left out"]
    seconds: float = 0.0
    showed: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


def run(sections: Sequence[Section], seconds: float, on_end: Callable[[Outcome], None]) -> list[Outcome]:
    """Run sections in order.

    Args:
        sections: to run.
        seconds: for all of them.
        on_end: called with each outcome as it comes.
    """
    end = time.monotonic() + seconds
    outcomes = []
    for section in sections:
        outcomes.append(_run(section, end - time.monotonic()))
        on_end(outcomes[-1])
    return outcomes


def _run(section: Section, seconds_left: float) -> Outcome:
    missing = [name for name in section.packages if not is_installed(name)]
    if missing:
        return Outcome(section.name, "left out", showed=f"not installed here: {', '.join(missing)}")
    limit = min(section.seconds, seconds_left)
    if limit < min(_LEAST_SECONDS, section.seconds):
        return Outcome(section.name, "left out", showed=f"{max(seconds_left, 0):.0f} s are left of the whole time")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers.json"
        code, last_line = _run_process(section.command(file), limit)
        numbers = json.loads(file.read_text()) if file.is_file() else {}
    taken = round(time.monotonic() - start, 1)
    if code is None:
        return Outcome(section.name, "out of time", taken, f"{limit:.0f} s are over, at: {last_line or '?'}", numbers)
    return Outcome(section.name, "failed" if code else "passed", taken, last_line, numbers)


def is_installed(distribution: str) -> bool:
    """Return whether a distribution is there."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _run_process(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Return the exit code, None where time ran out, and the last line that was printed."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # All that it starts can then be ended with it.
        start_new_session=True,
    )
    lines = deque[str](maxlen=1)
    assert process.stdout is not None
    reader = threading.Thread(target=_echo, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end_group(process)
    reader.join(_END_SECONDS)
    return code, lines[0] if lines else ""


def _echo(stream: IO[str], lines: "deque[str]") -> None:
    for line in stream:
        sys.stderr.write(line)
        if line.strip():
            lines.append(line.strip())


def _end_group(process: "subprocess.Popen[str]") -> None:
    """End what is left of a process's group: it itself, or what it has left behind and holds the GPU's memory."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_END_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def line(outcome: Outcome) -> str:
    """Return an outcome as a line of JSON."""
    return json.dumps(asdict(outcome))


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table, a line for each number."""
    lines = ["| section | result | seconds | showed |", "| --- | --- | --- | --- |"]
    for outcome in outcomes:
        shown = [f"{name}: {_text(value)}" for name, value in outcome.numbers.items()]
        if outcome.showed and (outcome.result != "passed" or not shown):
            shown.insert(0, outcome.showed)
        first, *others = shown or [""]
        lines.append(f"| {outcome.section} | {outcome.result} | {outcome.seconds:.0f} | {first} |")
        lines += [f"| | | | {other} |" for other in others]
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 0 where something ran and all that ran passed."""
    results = {outcome.result for outcome in outcomes} - {"left out"}
    return 0 if results == {"passed"} else 1
