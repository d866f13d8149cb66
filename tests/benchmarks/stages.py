"""The comparisons of every stage, and the whole iteration as the sum of its stages."""

from collections.abc import Sequence

from tests.benchmarks import checkpoint, generate, pair, score, start, storage, train
from tests.benchmarks.measure import Comparison, Values, run_way
from tests.benchmarks.work import Work

_ITERATION = (
    ("generate:ours", "generate:launches"),
    ("score:ours_stage", "score:upstream_files"),
    ("pair:ours_small", "pair:upstream_small"),
    ("train:ours", "train:trl"),
)


def _same_stages(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    checks = (generate.same_number, score.same_scores, pair.same_pairs, train.same_losses)
    pairs = zip(checks, ours, peer, strict=True)
    return "; ".join(filter(None, (check([mine], [theirs]) for check, mine, theirs in pairs)))


ITERATION = Comparison(
    "iteration",
    "the sum of upstream's ways, whole processes",
    ours=tuple(ours for ours, _ in _ITERATION),
    peer=tuple(peer for _, peer in _ITERATION),
    clock="process",
    check=_same_stages,
    least_ratio=4,
)

STAGES: dict[str, list[Comparison]] = {
    "score": score.COMPARISONS,
    "pair": pair.COMPARISONS,
    "train": train.COMPARISONS,
    "generate": generate.COMPARISONS,
    "start": start.COMPARISONS,
    "storage": storage.COMPARISONS,
    "checkpoint": checkpoint.COMPARISONS,
    "iteration": [ITERATION],
}


def finish_work(work: Work) -> None:
    """Add the reference log-probs that scoring hands to training."""
    train.fill_known(work.folder, run_way("train:known_logps", work.folder).values["logps"])
