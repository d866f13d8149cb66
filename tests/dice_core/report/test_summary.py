"""The table and the dict of a run."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dice_core.report.page import build_report
from dice_core.report.run_data import IterationData, StageData
from dice_core.report.summary import failure_lines, rows, status, summarise, summary, summary_table
from dice_core.storage.failures import StageFailure
from tests.synthetic_run import iteration, run_data, warm_start


def test_stages_after_a_refused_gate_are_shown_as_skipped_with_the_reason() -> None:
    skipped = StageData("skipped", skipped="the policy was refused by iteration-1/evaluate: answers grew")
    second = IterationData(2, {name: skipped for name in ("generate", "score", "pair", "train", "evaluate")})
    data = run_data(iteration(1, accepted=False), second)
    assert [status(one) for one in data.iterations] == ["refused", "skipped"]
    assert "iteration 2 skipped: the policy was refused by iteration-1/evaluate: answers grew" in summary_table(data)
    assert "the policy was refused by" in build_report(data)


def test_a_policy_that_did_not_improve_is_said_to_have_no_gain_and_by_how_much() -> None:
    data = run_data(iteration(1), iteration(2, improved=False))
    assert [status(one) for one in data.iterations] == ["accepted", "no gain"]
    assert "iteration 2 no gain: accuracy 87.5% -> 81.2% (-6.2 +/- 5.1 points)" in summary_table(data)
    assert summary(data)["iterations"][1]["improved"] == 0


@pytest.mark.parametrize(("seconds", "words"), [(4.24, "4.2 s"), (59.7, "1 min 00 s"), (5111, "1 h 25 min")])
def test_times_are_told_in_their_two_largest_units(seconds: float, words: str) -> None:
    stages = {"train": StageData("completed", {"seconds": seconds})}
    cells = {row.label: row.cells for row in rows(run_data(IterationData(1, stages)))}
    assert cells["train"] == (words,)


def test_a_run_in_progress_names_the_stage_that_has_not_finished() -> None:
    done = ("generate", "score")
    stages = {name: value if name in done else StageData() for name, value in iteration(1).stages.items()}
    assert status(IterationData(1, stages)) == "pair not finished"


def test_the_table_lines_up_in_a_terminal() -> None:
    lines = summary_table(run_data(warm_start(), iteration(1))).splitlines()
    assert len({len(line) for line in lines[:2]}) == 1
    assert "training: DPO loss, start -> end" in next(line for line in lines if "DPO loss" in line)
    assert all(line.isascii() for line in lines)


def test_the_summary_is_json_and_has_both_scales_of_the_length_penalty() -> None:
    values = json.loads(json.dumps(summary(run_data(iteration(1))), allow_nan=False))["iterations"][0]
    assert values["length_penalty"] == 0.0231
    assert values["length_penalty_paper"] == pytest.approx(0.00231)
    assert values["num_filtered"] == 112
    assert values["dropped"] == {"length_limit": 61, "too_short": 3, "few_valid_responses": 48}
    assert values["heldout_reward_accuracy_se"] == 0.0294
    assert values["seconds"]["train"] == 5111.0


def test_a_length_penalty_without_beta_has_no_paper_scale() -> None:
    stages = {"pair": iteration(1).stages["pair"]}
    assert summarise(IterationData(1, stages))["length_penalty_paper"] is None


def failure(place: str, **fields: Any) -> StageFailure:
    stage = place.split("/")[1] if "/" in place else place
    values = {"stage": stage, "reason": "the disk is full", "is_final": False, "time": "2026-11-29T00:01:31Z"}
    return StageFailure(**(values | fields), place=place)


def test_a_stage_that_failed_is_the_status_of_its_iteration_and_its_reason_stands_below_the_table() -> None:
    first = replace(iteration(1), failures=(failure("iteration-1/train", pod="x", node="w(0).train(0).executor(1)"),))
    data = replace(run_data(first), failures=(failure("check-settings", is_final=True),))
    assert status(first) == "train failed"
    table = summary_table(data).splitlines()
    assert table[-2:] == [
        "iteration 1: train failed: the disk is full (attempt 2, pod x, 2026-11-29 00:01:31 UTC)",
        "check-settings failed: the disk is full (2026-11-29 00:01:31 UTC, another attempt would meet it too)",
    ]
    json.dumps(summary(data))


def test_shards_that_failed_for_one_reason_are_one_line() -> None:
    places = [f"iteration-1/generate/shard-{shard}-of-64" for shard in range(64)]
    failures = [failure(place, reason="away" if place.endswith("/shard-7-of-64") else "full") for place in places]
    lines = failure_lines(failures)
    assert [line.task for line in lines] == ["generate, 63 of 64 shards,", "generate 8 of 64"]
    assert [line.reason for line in lines] == ["full", "away"]
    few = failure_lines(failure(f"iteration-1/score/shard-{shard}-of-8") for shard in (1, 5))
    assert [line.task for line in few] == ["score 2, 6 of 8"]
