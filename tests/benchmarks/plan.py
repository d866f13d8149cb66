"""The plan of `make demo` against a real one, stage by stage; and the shares of matrix products that plans rest on.

A plan is of a machine that does nothing else (it counts the processor's time), and the demo's time is the clock's: the
times compare where `load before` is small. Memory compares anywhere: the most that the processes of a stage held.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.measure import ROOT, BenchmarkError, Timed
from tests.benchmarks.work import Work

_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LINE = re.compile(r"\[ *\d+/\d+\] (?P<stage>.+?)(?: \d+ of \d+)?: +(?:(?P<minutes>\d+) min )?(?P<seconds>\d+) s")
_SAMPLE_SECONDS = 0.2
_ROW_PAIRS, _TRAINED_ROWS, _NUM_PROMPTS = 2, 4, 8


class Real(NamedTuple):
    """What a stage of a real demo took."""

    seconds: float
    processor_seconds: float
    peak_bytes: float


def demo(folder: Path) -> Timed:
    """Plan the demo, run it in a folder of its own, and compare. `folder` is not read."""
    from pipelines.overrides import find_preset
    from pipelines.planning.command import as_run_here
    from pipelines.planning.machine import measure_speed
    from pipelines.planning.make import make_plan

    machine = measure_speed()
    plan = make_plan(as_run_here(find_preset("demo"), [], machine), machine)
    with tempfile.TemporaryDirectory(prefix="dice-plan-") as place:
        real = run_demo(Path(place))
    lines = [
        compared(stage.title, stage.seconds, stage.largest.memory.total if stage.largest else 0.0, real[stage.title])
        for stage in plan.stages
    ]
    taken = real.values()
    everything = Real(
        sum(one.seconds for one in taken),
        sum(one.processor_seconds for one in taken),
        max(one.peak_bytes for one in taken),
    )
    peak = max(stage.largest.memory.total for stage in plan.stages if stage.largest)
    lines.append(compared("all", plan.seconds, peak, everything))
    return Timed(everything.seconds, {"lines": lines}, int(everything.peak_bytes))


def compared(stage: str, planned: Any, planned_bytes: float, real: Real) -> dict[str, Any]:
    """Return a line: the middle of the plan's bounds over what was real; None where the plan says `small`."""
    middle = (planned.low + planned.high) / 2
    return {
        "stage": stage,
        "plan, s": f"{planned.low:.0f} - {planned.high:.0f}",
        "real, s": real.seconds,
        "processor, s": real.processor_seconds,
        "middle over real": middle / real.seconds if real.seconds else None,
        "plan, GiB": planned_bytes / 2**30 or None,
        "real, GiB": real.peak_bytes / 2**30,
        "memory over real": planned_bytes / real.peak_bytes or None,
    }


def run_demo(place: Path) -> dict[str, Real]:
    """Run `make demo` in a folder, and return what each stage took, by its title."""
    command = [sys.executable, "-m", "pipelines.demo", "--folder", str(place / "demo")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    found: dict[str, Real] = {}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        watch = _Watch(process.pid)
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr)
            if told := stage_told(line):
                found[told[0]] = Real(told[1], *watch.take())
        watch.stop()
    if process.returncode:
        raise BenchmarkError(f"the demo ended with exit code {process.returncode}, see above")
    return found


def stage_told(line: str) -> tuple[str, float] | None:
    """Return the stage that a line of the demo tells the end of, by the plan's title, and its seconds."""
    found = _LINE.match(line)
    return (found["stage"], 60.0 * int(found["minutes"] or 0) + int(found["seconds"])) if found else None


class _Watch:
    """What the processes below another took since it was last asked; S3's server is left out."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._root, self._stopped = psutil.Process(pid), threading.Event()
        self._most, self._seconds, self._told = 0.0, dict[int, float](), dict[int, float]()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def take(self) -> tuple[float, float]:
        """Return the processor's seconds, and the most bytes that one process held; begin anew."""
        most, self._most = self._most, 0.0
        seconds = sum(now - self._told.get(pid, 0.0) for pid, now in self._seconds.items())
        self._told = dict(self._seconds)
        return seconds, most

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        import psutil

        while not self._stopped.wait(_SAMPLE_SECONDS):
            try:
                children = [child for child in self._root.children(recursive=True) if "python" in child.name()]
                self._most = max([self._most, *(child.memory_info().rss for child in children)])
                self._seconds |= {child.pid: sum(child.cpu_times()[:2]) for child in children}
            except psutil.Error:
                # It has ended since.
                continue


def shares(folder: Path, kind: str, dtype: str) -> Timed:
    """Measure what share of this machine's matrix products a kind of work reaches, by the processor's time.

    Args:
        folder: of the prepared work.
        kind: of _KINDS.
        dtype: bfloat16 (for training: autocast) or float32.
    """
    import torch

    from pipelines.planning.machine import measure_speed

    work, cores = Work(folder), torch.get_num_threads()
    operations, seconds = _KINDS[kind](work, dtype)
    speed = measure_speed().operations[dtype]
    share = operations / (seconds / cores) / speed
    return Timed(seconds, {"lines": [{"work": f"{kind}, {dtype}", "share of the machine's matrix products": share}]})


def _score(work: Work, dtype: str) -> tuple[float, float]:
    """Score the responses, each cut to 100 tokens: as long as the demo's."""
    from dice_core.logprobs.forward import PromptGroup, group_logps
    from dice_core.models.loading import load_model

    table = work.responses()
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, response in zip(
        table["prompt_token_ids"].to_pylist(), table["response_token_ids"].to_pylist(), strict=True
    ):
        by_prompt.setdefault(tuple(prompt), []).append(response[:100])
    groups = [PromptGroup(prompt, responses) for prompt, responses in by_prompt.items()]
    model = load_model(work.policy, dtype)  # type: ignore[arg-type]
    group_logps(model, groups[:1], tokens_per_batch=2048)
    seconds = _processor_seconds(lambda: group_logps(model, groups, tokens_per_batch=2048))
    num_responses = sum(sum(map(len, group.responses)) for group in groups)
    return _operations(sum(len(group.prompt_token_ids) for group in groups) + num_responses, num_responses), seconds


def _train(work: Work, dtype: str) -> tuple[float, float]:
    """Train on rows of pairs, with AdamW's step."""
    import torch

    from dice_core.models.loading import load_model
    from dice_core.training.batches import read_pairs
    from dice_core.training.trainer import PairScorer

    pairs = read_pairs(work.pairs(), 512, "the work").train
    scorer = PairScorer(load_model(work.policy, "float32"))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-6, fused=True)

    def step(row: Sequence[Any]) -> None:
        is_mixed = dtype == "bfloat16"
        context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext()
        with context:
            logps = scorer(row)
        logps.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = [pairs[start : start + _ROW_PAIRS] for start in range(0, len(pairs), _ROW_PAIRS)]
    step(rows[0])
    trained = rows[1 : 1 + _TRAINED_ROWS]
    seconds = _processor_seconds(lambda: [step(row) for row in trained])
    num_tokens = sum(pair.num_tokens for row in trained for pair in row)
    num_responses = num_tokens - sum(len(pair.prompt_token_ids) for row in trained for pair in row)
    return 3 * _operations(num_tokens, num_responses), seconds


def _generate(work: Work, dtype: str) -> tuple[float, float]:
    """Sample 16 responses to prompts like the demo's, once vLLM is ready."""
    from dice_core.data.settings import ChatConfig
    from dice_core.generation.responses import generate_parts
    from dice_core.generation.settings import GenerationConfig

    config = GenerationConfig(max_new_tokens=96, dtype=dtype, max_concurrent_sequences=64)  # type: ignore[arg-type]
    chat, sampled = ChatConfig(max_prompt_tokens=256), list[Any]()

    def sample(num_prompts: int) -> None:
        prompts = work.prompts(num_prompts)
        parts = generate_parts(work.policy, prompts, config=config, chat=chat, seed=5, parts=[0])
        ((_, table),) = parts
        sampled.append(table)

    # An engine's start, which the first of the two is nearly all of, is not sampling.
    start = _processor_seconds(lambda: sample(1))
    seconds = _processor_seconds(lambda: sample(1 + _NUM_PROMPTS)) - start
    counts = [sum(map(len, table["response_token_ids"].to_pylist())) for table in sampled]
    return _operations(counts[1] - counts[0], counts[1] - counts[0]), seconds


_KINDS: dict[str, Callable[[Work, str], tuple[float, float]]] = {
    "scoring": _score,
    "training": _train,
    "sampling": _generate,
}


def _operations(num_tokens: int, num_response_tokens: int) -> float:
    from pipelines.planning.find_model import find_model

    return find_model(_MODEL).shape.forward_operations(num_tokens, num_response_tokens)


def _processor_seconds(work: Callable[[], object]) -> float:
    """Return the processor's time that a piece of work takes, of this process and those that it starts."""
    before = os.times()
    work()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def ways() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the ways of this file that are measured apart, and their arguments."""
    yield from (("plan:shares", (kind, dtype)) for kind in _KINDS for dtype in ("float32", "bfloat16"))
    yield "plan:demo", ()
