"""The numbers of a run as one dict of plain values: summary.json. Page, terminal and KFP show these and no others.

Pure. verdict.py says what they mean for the whole run, table.py and page.py show them. docs/report.md lists the names.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dice_core.preferences.reward import paper_length_penalty
from dice_core.report.alpaca import alpaca_rows
from dice_core.report.answers import disputed_prompts, followed_prompts, without_texts
from dice_core.report.judged import groups_of_verdicts
from dice_core.report.numbers import plain
from dice_core.report.resources import gpu_hours, resources
from dice_core.report.run_data import IterationData, RunData, StageData
from dice_core.report.verdict import run_verdict
from dice_core.storage.failures import StageFailure

_NUM_NAMED_SHARDS = 4
FAILED = "failed"
"""Ends the status of an iteration one of whose stages left a reason."""
_SOURCES = ("policy_source", "reference_source", "preferences_source", "prompts_source")


class FailureLine(NamedTuple):
    """Why a task failed, or shards of it."""

    task: str
    reason: str
    details: str
    """Attempt, pod, time, and whether it is final."""

    @property
    def text(self) -> str:
        """The reason, with the details."""
        return f"{self.reason} ({self.details})"


def name(iteration: IterationData) -> str:
    """Return what people call an iteration."""
    return f"iteration {iteration.number}" if iteration.number else "warm start"


def status(iteration: IterationData) -> str:
    """Return where an iteration stands: the gate's outcome, refused, skipped, or what failed or goes on.

    Better, not shown and worse are outcomes of policies with which the run may go on; accepted is one of an evaluation
    that an earlier version made.
    """
    stages = iteration.stages
    if iteration.failures:
        return f"{iteration.failures[0].stage} {FAILED}"
    if any(stage.state == "skipped" for stage in stages.values()):
        return "skipped"
    if all(stage.state == "missing" for stage in stages.values()):
        return "not started"
    open_stages = [stage for stage, data in stages.items() if data.state in ("missing", "partial")]
    if open_stages:
        return f"{open_stages[0]} not finished"
    if iteration.number == 0:
        return "completed"
    decision = iteration.stage("evaluate").metrics
    return str(decision.get("outcome", "accepted")) if decision.get("accepted") else "refused"


def failure_lines(failures: Iterable[StageFailure]) -> list[FailureLine]:
    """Return what to say of failures; shards of a stage that failed for one reason are one line."""
    groups: dict[tuple[str, str], list[StageFailure]] = {}
    for failure in failures:
        task = failure.stage if failure.shard else failure.title.rpartition(": ")[2]
        groups.setdefault((task, failure.reason), []).append(failure)
    return [
        FailureLine(task + (_shards(group) if group[0].shard else ""), reason, _details(group[0]))
        for (task, reason), group in groups.items()
    ]


def _details(failure: StageFailure) -> str:
    when = failure.time.replace("T", " ").replace("Z", " UTC")
    return ", ".join(
        filter(None, [failure.where, when, "another attempt would meet it too" if failure.is_final else ""])
    )


def _shards(failures: Sequence[StageFailure]) -> str:
    shards = [failure.shard for failure in failures if failure.shard]
    of_all = f"of {shards[0][1]}"
    if len(shards) > _NUM_NAMED_SHARDS:
        return f", {len(shards)} {of_all} shards,"
    return f" {', '.join(str(shard + 1) for shard, _ in shards)} {of_all}"


def summary(data: RunData, *, gpu_hour_price: float = 0) -> dict[str, Any]:
    """Return the whole run as plain JSON types; None where a number is not known, and never one that is not finite.

    Args:
        data: of `collect`.
        gpu_hour_price: of one GPU, in any currency; 0: as the run was planned, or not known.
    """
    plan = data.plan
    iterations = [summarise(iteration) for iteration in data.iterations]
    found = {
        "run": data.uri.rstrip("/").rpartition("/")[2],
        "run_uri": data.uri,
        "preset": plan.get("preset") or None,
        **{source: plan.get(source) or None for source in _SOURCES},
        "package_version": data.package_version,
        "written": data.written,
        "verdict": run_verdict(iterations, failure_lines(data.failures), data.promoted),
        "resources": resources(data, gpu_hour_price or float(plan.get("gpu_hour_price") or 0)),
        "data": {key: value for key, value in data.data.metrics.items() if key.startswith("num_")},
        "iterations": iterations,
        "alpaca_eval": alpaca_rows(data),
        "answers": without_texts(followed_prompts(data.iterations)),
        "disputed": without_texts(disputed_prompts(data.iterations)),
        "settings": {key: value for key, value in plan.items() if isinstance(value, Mapping)} | {"seed": _seed(data)},
        "trackers": _trackers(data),
        "notes": list(data.notes),
        "failures": {line.task: line.text for line in failure_lines(data.failures)},
    }
    return plain(found)  # type: ignore[no-any-return]


def _trackers(data: RunData) -> dict[str, str]:
    """Return the pages of experiment trackers that the stages name: metrics such as mlflow_url."""
    stages = [data.data, *(stage for one in data.iterations for stage in one.stages.values())]
    found = {name: str(value) for stage in stages for name, value in stage.metrics.items() if name.endswith("_url")}
    return {name: url for name, url in found.items() if url.startswith(("http://", "https://"))}


def _seed(data: RunData) -> Any:
    stages: list[StageData] = [stage for one in data.iterations for stage in one.stages.values()]
    return data.plan.get("seed", next((stage.settings["seed"] for stage in stages if "seed" in stage.settings), None))


def summarise(iteration: IterationData) -> dict[str, Any]:
    """Return the numbers of one iteration, flat but for a few groups of them; None where one is not known."""
    names = ("generate", "score", "pair", "train", "evaluate")
    generate, score, pair, train, evaluate = (iteration.stage(name).metrics for name in names)
    training = iteration.stage("train").settings.get("training", {})
    evaluation = iteration.evaluation or {}
    reason = evaluate.get("reason") or next((s.skipped for s in iteration.stages.values() if s.skipped), "")
    return {
        "iteration": iteration.number,
        "name": name(iteration),
        "status": status(iteration),
        "failures": {line.task: line.text for line in failure_lines(iteration.failures)},
        "reason": reason,
        **_uris(iteration),
        **_copied(generate, score, pair, train),
        "length_penalty_paper": _paper_penalty(pair, training),
        "length_unit": _length_unit(iteration),
        "step0_loss_expected": expected_first_loss(training) if training else None,
        "generated_tokens_per_second": _generated_tokens_per_second(generate),
        "dropped": dropped(iteration),
        "num_filtered": sum(dropped(iteration).values()) if score else None,
        **{field: value for field, value in evaluate.items() if field not in ("seconds", "reason", "num_gpus")},
        "gate": {"outcome": None, "rules": [], "warnings": [], **evaluation.get("gate", {})},
        "judging": evaluation.get("judging", {}),
        "compared_with": evaluation.get("compared_with", {}),
        **groups_of_verdicts(evaluation.get("samples", [])),
        "seconds": {name: stage.metrics.get("seconds") for name, stage in iteration.stages.items()},
        "gpu_hours": {name: gpu_hours(stage) for name, stage in iteration.stages.items()},
    }


def _paper_penalty(pair: Mapping[str, Any], training: Mapping[str, Any]) -> float | None:
    """Return the length penalty on the paper's scale, which has no other reward than the implicit one."""
    penalty, beta = pair.get("length_penalty"), training.get("beta")
    # Pairs of earlier versions do not say which reward theirs is.
    if penalty is None or beta is None or pair.get("reward", "implicit") != "implicit":
        return None
    return paper_length_penalty(float(penalty), beta)


def _length_unit(iteration: IterationData) -> str:
    unit = str(iteration.stage("pair").settings.get("pairing", {}).get("length_unit", "characters"))
    return unit.removesuffix("s")


def _uris(iteration: IterationData) -> dict[str, Any]:
    """Return where the policy is that the iteration made, and its evaluation."""
    places = {"policy_uri": iteration.stage("train"), "evaluation_uri": iteration.stage("evaluate")}
    return {field: next(iter(stage.manifests), None) for field, stage in places.items()}


def _copied(*metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of stages that the page shows, as those stages named them."""
    generate, score, pair, train = metrics
    copied = {
        "num_prompts": generate,
        "num_responses": generate,
        "num_response_tokens": generate,
        "num_cut_responses": generate,
        "num_duplicate_responses": generate,
        "num_scored": score,
        **dict.fromkeys(("reward_mean", "reward_std", "reward_agreement", "num_agreement_prompts"), score),
        "implicit_reward_std": {"implicit_reward_std": score.get("implicit_reward_std", score.get("reward_std"))},
        **dict.fromkeys(("num_generated_pairs", "num_replayed_pairs", "num_train_pairs", "num_eval_pairs"), pair),
        **dict.fromkeys(("num_non_finite_scores", "num_few_responses_prompts", "num_tied_prompts"), pair),
        **dict.fromkeys(("num_identical_pairs", "num_unused_generated_pairs"), pair),
        **dict.fromkeys(("num_identical_offline_pairs", "num_missing_replayed_pairs"), pair),
        **dict.fromkeys(("length_penalty", "length_gap", "length_gap_unpenalised"), pair),
        **dict.fromkeys(("first_loss", "last_loss", "first_reward_accuracy", "last_reward_accuracy"), train),
        **dict.fromkeys(("num_measured_pairs", "num_steps", "num_dropped_pairs", "num_processes"), train),
        **dict.fromkeys(("step0_loss", "reference_noise_rms", "relative_update", "update_rounding_loss"), train),
        **dict.fromkeys(("tokens_per_second", "peak_memory_bytes", "mfu"), train),
    }
    return {field: found.get(field) for field, found in copied.items()}


def _generated_tokens_per_second(generate: Mapping[str, Any]) -> float | None:
    tokens, seconds = generate.get("num_response_tokens"), generate.get("seconds")
    return round(tokens / seconds, 1) if tokens and seconds else None


def expected_first_loss(training: Mapping[str, Any]) -> float | None:
    """Return the loss where policy and reference are one model, or None where it depends on the data.

    Args:
        training: TrainingConfig as a dict.
    """
    if training.get("sft_weight") or training.get("reference") == "base":
        return None
    beta = training.get("beta", 0.1)
    return {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * beta**2)}.get(training.get("loss", "sigmoid"))


def dropped(iteration: IterationData) -> dict[str, int]:
    """Return how many responses score dropped, by reason."""
    metrics, prefix = iteration.stage("score").metrics, "num_dropped_"
    return {key.removeprefix(prefix): int(value) for key, value in metrics.items() if key.startswith(prefix)}
