"""Runs ways of doing a piece of work, each in a process of its own, and compares what they took.

A way is a function `name(work, *arguments) -> Timed` of a module of this package, named "module:name". A fresh process
gives each its own peak memory (VmHWM) and a cold start; repeats are interleaved, so that what else the machine does
falls on all ways alike.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
Values = Mapping[str, Any]


class BenchmarkError(RuntimeError):
    """A way did not run, or two ways did not do the same. The message is one line."""


@dataclass
class Stopwatch:
    """Seconds of the timed part, set when it ends, and the memory that the process held when it began."""

    held_bytes: int
    seconds: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Time the body."""
    watch = Stopwatch(_status_bytes("VmRSS"))
    start = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - start


@dataclass(frozen=True)
class Timed:
    """What a way returns.

    Attributes:
        seconds: of the part that is compared, without imports and loading.
        values: results, as JSON, for the check that the ways did the same work.
        peak_bytes: of accelerators or of processes the way started itself; 0 where there are none.
        held_bytes: before the timed part: libraries, models, inputs; 0 where that is not known.
    """

    seconds: float
    values: Values
    peak_bytes: int = 0
    held_bytes: int = 0

    @classmethod
    def of(cls, watch: Stopwatch, values: Values, peak_bytes: int = 0) -> "Timed":
        """Take seconds and held memory from a stopwatch; the latter only where this process did the work."""
        return cls(watch.seconds, values, peak_bytes, 0 if peak_bytes else watch.held_bytes)


@dataclass(frozen=True)
class Outcome:
    """One run of a way: the timed part, the whole process with its imports, and the most memory it held."""

    seconds: float
    process_seconds: float
    peak_bytes: int
    values: Values
    held_bytes: int = 0


def run_way(way: str, folder: Path, *arguments: object) -> Outcome:
    """Run a way in a fresh process.

    Args:
        way: "module:function".
        folder: of the prepared work.
        arguments: passed as text.

    Raises:
        BenchmarkError: it failed; what it printed is above.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "tests.benchmarks.worker", way, str(folder), file.name, *map(str, arguments)]
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONPATH": path, "TQDM_DISABLE": "1"}
        start = time.perf_counter()
        # What libraries print goes to standard error: standard output holds the result alone.
        code = subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=False).returncode
        process_seconds = time.perf_counter() - start
        if code:
            raise BenchmarkError(f"{way} ended with exit code {code}, see above")
        return Outcome(process_seconds=process_seconds, **json.loads(Path(file.name).read_text()))


def peak_resident_bytes() -> int:
    """Return the most memory this process has held. Unlike ru_maxrss it is not inherited from the parent."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/self/status has no {name}: benchmarks need Linux")


def measure(ways: Iterable[str], folder: Path, repeats: int, log: Callable[[str], None]) -> dict[str, list[Outcome]]:
    """Run each way `repeats` times, in turns."""
    wanted = list(dict.fromkeys(ways))
    outcomes: dict[str, list[Outcome]] = {way: [] for way in wanted}
    for number in range(repeats):
        for way in wanted:
            outcome = run_way(way, folder)
            outcomes[way].append(outcome)
            log(
                f"{way}, {number + 1} of {repeats}: {outcome.seconds:.3f} s of {outcome.process_seconds:.1f} s, "
                f"{outcome.peak_bytes / 1e9:.2f} GB"
            )
    return outcomes


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    Attributes:
        stage: score, pair, train, generate or iteration.
        against: the peer's way in words.
        ours, peer: ways; of several, times add up and memory is the largest.
        clock: `part` compares the timed part, `process` whole processes with imports and model loads.
        check: takes the values of our ways and of the peer's, returns in words what differs, "" if nothing does.
        least_ratio, most_memory: the goals, None where none was set.
    """

    stage: str
    against: str
    ours: tuple[str, ...]
    peer: tuple[str, ...]
    clock: Literal["part", "process"]
    check: Callable[[Sequence[Values], Sequence[Values]], str]
    least_ratio: float | None = None
    most_memory: float | None = None


@dataclass(frozen=True)
class Memory:
    """The most memory of a way, and how much of it the timed part added; 0 where that is not known."""

    peak: float
    grown: float


@dataclass(frozen=True)
class Row:
    """A comparison's numbers: ratios are the peer's time over ours, memory is ours over the peer's."""

    stage: str
    against: str
    ratios: list[float]
    our_seconds: float
    peer_seconds: float
    difference: str
    least_ratio: float | None
    most_memory: float | None
    our_bytes: Memory
    peer_bytes: Memory

    @property
    def ratio(self) -> float:
        """Return the median."""
        return statistics.median(self.ratios)

    @property
    def memory(self) -> float:
        """Return our peak over the peer's."""
        return self.our_bytes.peak / self.peer_bytes.peak

    @property
    def is_reached(self) -> bool | None:
        """Return whether every goal is reached and the results agree; None without a goal."""
        if self.least_ratio is None and self.most_memory is None:
            return None
        is_fast = self.least_ratio is None or self.ratio >= self.least_ratio
        is_small = self.most_memory is None or self.memory <= self.most_memory
        return is_fast and is_small and not self.difference

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types, with what follows from the fields."""
        return {**asdict(self), "ratio": self.ratio, "memory": self.memory, "is_reached": self.is_reached}


def compare(comparison: Comparison, outcomes: Mapping[str, Sequence[Outcome]]) -> Row:
    """Make a row of measured ways."""
    ours, peer = (
        [[outcomes[way][i] for way in ways] for i in range(len(outcomes[ways[0]]))]
        for ways in (comparison.ours, comparison.peer)
    )
    our_seconds, peer_seconds = (
        [sum(_seconds(outcome, comparison.clock) for outcome in run) for run in runs] for runs in (ours, peer)
    )
    differences = [
        comparison.check([o.values for o in our_run], [o.values for o in peer_run])
        for our_run, peer_run in zip(ours, peer, strict=True)
    ]
    return Row(
        stage=comparison.stage,
        against=comparison.against,
        ratios=[theirs / mine for mine, theirs in zip(our_seconds, peer_seconds, strict=True)],
        our_seconds=statistics.median(our_seconds),
        peer_seconds=statistics.median(peer_seconds),
        difference=next(filter(None, differences), ""),
        least_ratio=comparison.least_ratio,
        most_memory=comparison.most_memory,
        our_bytes=_memory(ours),
        peer_bytes=_memory(peer),
    )


def _memory(runs: Sequence[Sequence[Outcome]]) -> Memory:
    peaks = [max(outcome.peak_bytes for outcome in run) for run in runs]
    grown = [max(o.peak_bytes - o.held_bytes if o.held_bytes else 0 for o in run) for run in runs]
    return Memory(statistics.median(peaks), statistics.median(grown))


def _seconds(outcome: Outcome, clock: str) -> float:
    return outcome.seconds if clock == "part" else outcome.process_seconds
