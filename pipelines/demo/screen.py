"""Turns kfp.local's log into a line per stage, with the progress of the one that runs.

Reads lines and writes lines; demo.py runs the pipeline and keeps the whole log.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from dice_core.stages.table import STAGES
from dice_core.storage.manifest import Manifest

_COLOUR = re.compile(r"\x1b\[\d+m")
_STARTED = re.compile(r"- INFO - Executing task '(.+)'$")
_ENDED = re.compile(r"- (?:INFO|ERROR) - Task '(.+)' finished with status (SUCCESS|FAILURE)")
# A task's own output is indented; dice_core.progress begins a line with the time, torchrun with the process.
_PROGRESS = re.compile(r" {4}(?:\[\w+\]:)?\d\d:\d\d:\d\d (.+)$")
_FAULT = re.compile(r" {4}(?:[\w.]+(?:Error|Exception)): (.+)$")
# Components keep a stage's address and status with its metrics, which kfp prints when a task has ended.
_URI = re.compile(r" +metadata=\{.*'uri': '([^']+)'")
_STATUS = re.compile(r" +metadata=\{.*'status': '([a-z ]+)'")
_SEPARATOR = re.compile(r"-{20,}$")
_NOT_NEWS = re.compile(r"[\w-]+: (completed in|already complete|skipped)")


class Screen:
    """Follows a run line by line."""

    def __init__(self, labels: Mapping[str, list[str]], describe: Callable[[str], str], out: TextIO) -> None:
        """Take what is known of the run.

        Args:
            labels: what to call a task, by kfp's name of it; several tasks of one name run in the order given.
            describe: a few words on what lies at the address that a task returned.
            out: where to write; on a terminal the line of the running stage changes in place.
        """
        self._labels = {name: list(values) for name, values in labels.items()}
        self._num_tasks = sum(len(values) for values in labels.values())
        self._describe, self._out, self._is_terminal = describe, out, out.isatty()
        self._num_started, self._is_running, self._start = 0, False, 0.0
        self._state, self._uri, self._error = "", "", ""
        self._label, self._failed = "", ""
        self.fault = ""
        """The error of the first task that failed; empty while none has, and if it told none."""
        self.last_line = ""
        """The latest line of the log that was not empty."""

    @property
    def label(self) -> str:
        """What to call the first task that failed; if none has, the one that was begun last; empty before the first."""
        return self._failed or self._label

    def feed(self, line: str) -> None:
        """Take the next line of the log."""
        line = _COLOUR.sub("", line.rstrip())
        self.last_line = line.strip() or self.last_line
        if match := _STARTED.search(line):
            self._begin(match[1])
        elif match := _ENDED.search(line):
            if match[2] == "FAILURE":
                self._fail()
        elif match := _URI.match(line):
            self._uri = match[1]
            if (status := _STATUS.match(line)) and status[1] != "completed":
                self._state = status[1]
        elif _SEPARATOR.match(line) and self._is_running:
            self._end()
        elif match := _PROGRESS.match(line):
            self._show_progress(match[1])
        elif (match := _FAULT.match(line)) and not self._error:
            self._error = match[1]

    def _begin(self, task: str) -> None:
        names = self._labels.get(task, [])
        self._label = names.pop(0) if names else task
        self._num_started, self._is_running, self._start = self._num_started + 1, True, time.monotonic()
        self._state, self._uri, self._error = "", "", ""
        if self._is_terminal:
            self._rewrite(f"{self._prefix()} ...")

    def _fail(self) -> None:
        self._state = "FAILED"
        # The report is made after a failure too, and may fail in its turn.
        if not self._failed:
            self._failed = self._label
            self.fault = f"{self._label}: {self._error}" if self._error else ""

    def _show_progress(self, text: str) -> None:
        if _NOT_NEWS.match(text):
            return
        if self._is_terminal:
            self._rewrite(f"{self._prefix()} {text}")
        else:
            print(f"        {text}", file=self._out, flush=True)

    def _end(self) -> None:
        seconds = time.monotonic() - self._start
        words = [self._state or f"{seconds:.0f} s"]
        if self._uri and self._state != "skipped":
            words.append(self._describe(self._uri))
        if self._is_terminal:
            self._out.write("\r\x1b[K")
        print(f"{self._prefix()} {'; '.join(word for word in words if word)}", file=self._out, flush=True)
        self._is_running = False

    def _prefix(self) -> str:
        return f"[{self._num_started:2d}/{self._num_tasks}] {self._label + ':':<28}"

    def _rewrite(self, text: str) -> None:
        self._out.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        self._out.flush()


def task_labels(pipeline_spec: Any) -> dict[str, list[str]]:
    """Return what to call the tasks of a compiled pipeline, by the name that kfp.local's log has for them.

    Args:
        pipeline_spec: kfp's PipelineSpec message.
    """
    labels: dict[str, list[str]] = {}

    def visit(dag: Any, path: str) -> None:
        for task in dag.tasks.values():
            component = pipeline_spec.components[task.component_ref.name]
            name = task.task_info.name
            if component.HasField("dag"):
                # The exit handler is a frame around the run, not a part that a person knows.
                visit(component.dag, f"{path}{name}: " if name.startswith("iteration") else path)
            else:
                labels.setdefault(task.component_ref.name.removeprefix("comp-"), []).append(path + name)

    visit(pipeline_spec.root.dag, "")
    return labels


def describe(manifest: Manifest) -> str:
    """Return the counts of a stage that tell a person most, such as `28 prompts, 112 responses`."""
    shown = STAGES[manifest.stage].shown if manifest.stage in STAGES else ()
    metrics = ((name, manifest.metrics[name]) for name in shown if name in manifest.metrics)
    return ", ".join(_put_in_words(name, value) for name, value in metrics)


def _put_in_words(name: str, value: float | str) -> str:
    words = name.removeprefix("num_").replace("_", " ")
    if name.startswith("num_"):
        return f"{value} {words}"
    return f"{words} {value:.4g}" if isinstance(value, float) else f"{words} {value}"
