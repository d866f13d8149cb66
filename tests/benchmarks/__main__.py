"""Measure ours against each peer's way: `python -m tests.benchmarks [--stage score] [--size smoke]`, see --help."""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from dice_core.progress import log
from tests.benchmarks import gpu, plan, results, train
from tests.benchmarks.measure import BenchmarkError, Comparison, Outcome, compare, measure, run_way
from tests.benchmarks.results import Curve, Point, Results
from tests.benchmarks.stages import STAGES, finish_work
from tests.benchmarks.work import SIZES, Size, Work, prepare


def main(
    arguments: list[str] | None = None,
    *,
    comparisons: Mapping[str, Sequence[Comparison]] = STAGES,
    make_work: Callable[[Size], Work] = lambda size: prepare(size, finish_work),
) -> int:
    """Measure, print the table, write the files.

    Args:
        arguments: of the command; those of this process by default.
        comparisons: by stage.
        make_work: makes the work of a size.
    """
    options = _parser().parse_args(arguments)

    before = results.measured_before(options.out) if options.out and options.stage else None

    def keep(found: Results) -> None:
        """Write what there is: an interrupted run has its finished stages, a run of one stage keeps the others'."""
        found = results.with_others_of(before, found) if before else found
        if options.json:
            options.json.write_text(results.to_json(found))
        if options.out:
            results.write(found, options.out)

    try:
        found = run(
            SIZES[options.size],
            options.stage or list(comparisons),
            options.repeats,
            not options.no_curves,
            on_stage=keep,
            comparisons=comparisons,
            make_work=make_work,
        )
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(results.markdown(found))
    return 1 if found.failed or any(row.difference for row in found.rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument(
        "--stage", action="append", choices=[*STAGES, "gpu", "plan"], help="only this one; may be repeated"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, interleaved (3)")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="smoke only shows that everything runs")
    parser.add_argument("--no-curves", action="store_true", help="leave out time and memory against work")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--out", type=Path, help="write RESULTS.md, results.json and curves into this folder")
    return parser


def run(
    size: Size,
    stages: Sequence[str],
    repeats: int,
    with_curves: bool,
    on_stage: Callable[[Results], None],
    comparisons: Mapping[str, Sequence[Comparison]],
    make_work: Callable[[Size], Work],
) -> Results:
    """Measure stages. One that fails does not take the others with it: `failed` says which, and why.

    Args:
        size: of the work.
        stages: of STAGES, or `gpu`, or `plan`.
        repeats: of each way.
        with_curves: whether to measure other amounts of work too.
        on_stage: gets the results so far after each stage.
        comparisons: by stage.
        make_work: makes the work of a size.

    Raises:
        BenchmarkError: the work cannot be prepared.
    """
    wants_gpu = _wants_gpu(stages)
    available, left_out = _available([c for stage in stages for c in comparisons.get(stage, [])])
    found = Results(
        command=shlex.join(["python", "-m", "tests.benchmarks", *sys.argv[1:]]),
        machine=results.machine(),
        # As it comes back from the file.
        work=json.loads(json.dumps(asdict(size))),
        repeats=repeats,
        left_out=left_out,
    )
    work = make_work(size) if available or "plan" in stages else None
    if work and available:
        _measure_stages(work, available, found, with_curves, on_stage)
    for way, arguments in plan.ways() if work and "plan" in stages else ():
        with _noted(found, f"plan, {way}"):
            lines = run_way(way, work.folder, *arguments).values["lines"]
            (found.plan if way == "plan:demo" else found.shares).extend(lines)
        on_stage(found)
    for shape in gpu.SHAPES if wants_gpu else ():
        with _noted(found, f"gpu, {shape}"):
            found.gpu.extend(run_way("gpu:measure", Path(), shape).values["lines"])
        on_stage(found)
    return found


def _measure_stages(
    work: Work,
    comparisons: Sequence[Comparison],
    found: Results,
    with_curves: bool,
    on_stage: Callable[[Results], None],
) -> None:
    outcomes: dict[str, list[Outcome]] = {}
    for stage in dict.fromkeys(comparison.stage for comparison in comparisons):
        of_stage = [c for c in comparisons if c.stage == stage]
        # All ways of a stage take turns together; the iteration adds up what is measured already.
        ways = [way for c in of_stage for way in (*c.ours, *c.peer) if way not in outcomes]
        with _noted(found, stage):
            outcomes |= measure(ways, work.folder, found.repeats, log)
            found.rows.extend(compare(comparison, outcomes) for comparison in of_stage)
        with _noted(found, f"{stage}, curves"):
            found.curves.extend(_curves(work, stage) if with_curves else [])
        on_stage(found)


@contextmanager
def _noted(found: Results, what: str) -> Iterator[None]:
    """Note a failure, and go on."""
    try:
        yield
    except BenchmarkError as error:
        found.failed.append(f"{what}: {error}")


def _wants_gpu(stages: Sequence[str]) -> bool:
    import torch

    if "gpu" in stages and not torch.cuda.is_available():
        raise BenchmarkError("--stage gpu needs a CUDA device, and PyTorch finds none here")
    return torch.cuda.is_available() and bool({"gpu", "score", "train"} & set(stages))


def _available(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[str]]:
    """Return what can be measured here, and why the rest cannot."""
    kept, left_out = [], []
    is_vllm_there = importlib.util.find_spec("vllm") is not None
    for comparison in comparisons:
        ways = " ".join((*comparison.ours, *comparison.peer))
        reason = ""
        if "train:trl" in ways and not train.is_trl_there():
            reason = train.HOW_TO_INSTALL
        elif "generate:" in ways and not is_vllm_there:
            reason = "vLLM is not there: `make install`"
        if reason:
            left_out.append(f"{comparison.stage} against {comparison.against}: {reason}")
        else:
            kept.append(comparison)
    return kept, left_out


def _curves(work: Work, stage: str) -> list[Curve]:
    size = work.size
    if stage == "pair":
        pandas = [n for n in size.pairing_curve if n <= size.num_pandas_prompts]
        ours, peer = _points(work, "pair:ours_exact", size.pairing_curve), _points(work, "pair:upstream", pandas)
        return [Curve("Pairing", f"prompts x {size.num_responses}", ours, peer)]
    for name, name_of_work, ours_way, peer_way, amounts in (
        ("Scoring", "responses to one prompt", "score:ours_forward", "score:upstream_forward", size.scoring_curve),
        ("Training", f"pairs, {size.batch_size} a step", "train:ours", "train:trl", size.training_curve),
        (
            "Generation",
            f"prompts x {size.num_responses}",
            "generate:ours_many",
            "generate:raw_many",
            size.generation_curve,
        ),
    ):
        is_there = peer_way != "train:trl" or train.is_trl_there()
        if ours_way.startswith(f"{stage}:") and is_there:
            return [Curve(name, name_of_work, _points(work, ours_way, amounts), _points(work, peer_way, amounts))]
    return []


def _points(work: Work, way: str, amounts: Sequence[int]) -> list[Point]:
    points = []
    for amount in amounts:
        outcome = run_way(way, work.folder, amount)
        log(f"{way}, {amount}: {outcome.seconds:.3f} s, {outcome.peak_bytes / 1e9:.2f} GB")
        points.append(Point(way, amount, outcome.seconds, outcome.peak_bytes))
    return points


if __name__ == "__main__":
    sys.exit(main())
