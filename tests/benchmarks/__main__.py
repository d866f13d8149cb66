"""Measure ours against each peer's way: `python -m tests.benchmarks [--stage score] [--size smoke]`, see --help."""

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dice_core.progress import log
from tests.benchmarks import results, train
from tests.benchmarks.measure import BenchmarkError, Comparison, Outcome, compare, measure, run_way
from tests.benchmarks.results import Curve, Point, Results
from tests.benchmarks.stages import STAGES, finish_work
from tests.benchmarks.work import SIZES, Size, Work, prepare


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the files."""
    options = _parser().parse_args(arguments)
    try:
        found = run(
            SIZES[options.size], options.stage or list(STAGES), options.repeats, with_curves=not options.no_curves
        )
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(results.markdown(found))
    if options.json:
        options.json.write_text(results.to_json(found))
    if options.out:
        results.write(found, options.out)
    return 1 if found.failed or any(row.difference for row in found.rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--stage", action="append", choices=[*STAGES, "gpu"], help="only this one; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, interleaved (3)")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="smoke only shows that everything runs")
    parser.add_argument("--no-curves", action="store_true", help="leave out time and memory against work")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--out", type=Path, help="write RESULTS.md, results.json and the curves into this folder")
    return parser


def run(size: Size, stages: Sequence[str], repeats: int, *, with_curves: bool) -> Results:
    """Measure stages. One that fails does not take the others with it: `failed` says which, and why.

    Raises:
        BenchmarkError: the work cannot be prepared.
    """
    described = results.machine()
    work = prepare(size, finish_work)
    comparisons, left_out = _available([c for stage in stages for c in STAGES.get(stage, [])])
    outcomes: dict[str, list[Outcome]] = {}
    gpu: list[dict[str, str]] = []
    failed = []
    for stage in dict.fromkeys(comparison.stage for comparison in comparisons):
        # All ways of a stage take turns together; the iteration adds up what is measured already.
        ways = [way for c in comparisons if c.stage == stage for way in (*c.ours, *c.peer) if way not in outcomes]
        try:
            outcomes |= measure(ways, work.folder, repeats, log)
        except BenchmarkError as error:
            failed.append(f"{stage}: {error}")
    curves = []
    try:
        if _wants_gpu(stages):
            gpu = run_way("gpu:measure", work.folder).values["lines"]
        curves = [curve for stage in stages if with_curves for curve in _curves(work, stage)]
    except BenchmarkError as error:
        failed.append(f"curves or accelerator: {error}")
    measured = [c for c in comparisons if all(way in outcomes for way in (*c.ours, *c.peer))]
    return Results(
        command=shlex.join(["python", "-m", "tests.benchmarks", *sys.argv[1:]]),
        machine=described,
        work=asdict(size),
        repeats=repeats,
        rows=[compare(comparison, outcomes) for comparison in measured],
        curves=curves,
        gpu=gpu,
        left_out=left_out,
        failed=failed,
    )


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
    if stage == "score":
        amounts = size.scoring_curve
        ours, peer = (_points(work, way, amounts) for way in ("score:ours_forward", "score:upstream_forward"))
        return [Curve("Scoring", "responses to one prompt", ours, peer)]
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
