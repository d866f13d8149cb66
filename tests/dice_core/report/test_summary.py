"""The dict of a run, its tables and its verdict."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dice_core.report.page import build_report
from dice_core.report.run_data import IterationData, StageData, merge_shards
from dice_core.report.summary import expected_first_loss, failure_lines, status, summarise, summary
from dice_core.report.table import columns_of, overview, summary_table
from dice_core.storage.failures import StageFailure
from dice_core.storage.manifest import Manifest
from tests.synthetic_run import POINTER, iteration, policy_of, run_data, warm_start


def sentence(*iterations: IterationData, promoted: int = 0) -> str:
    return str(summary(run_data(*iterations, promoted=promoted))["verdict"]["sentence"])


def test_stages_after_a_refused_gate_are_shown_as_skipped_with_the_reason() -> None:
    skipped = StageData("skipped", skipped="the policy was refused by iteration-1/evaluate: answers grew")
    second = IterationData(2, {name: skipped for name in ("generate", "score", "pair", "train", "evaluate")})
    data = run_data(iteration(1, accepted=False), second)
    assert [status(one) for one in data.iterations] == ["refused", "skipped"]
    table = summary_table(summary(data))
    assert "iteration 2 skipped: the policy was refused by iteration-1/evaluate: answers grew" in table
    assert "the policy was refused by" in build_report(data)


def test_a_policy_that_is_not_shown_to_be_better_is_said_so_and_by_how_much() -> None:
    data = run_data(iteration(1), iteration(2, "not shown"))
    assert [status(one) for one in data.iterations] == ["better", "not shown"]
    assert "iteration 2 not shown: win rate 51.2% (95% interval 48.2% to 54.2%)" in summary_table(summary(data))


def test_the_verdict_of_sixteen_pairs_is_not_shown_and_tells_how_many_would_be_needed() -> None:
    first, second = iteration(1, "not shown", judged=False), iteration(2, "not shown", judged=False)
    metrics = second.stages["evaluate"].metrics
    metrics["num_held_out_pairs"] = 16
    assert sentence(warm_start(), first, second) == (
        "Not shown to be better: iteration 2 against the first policy moves implicit-reward accuracy on 16 held-out "
        "pairs from 59.4% to 66.4%, by +12.5 points (95% interval -5.6 to +30.6); 431 pairs would be needed to show a "
        "difference of 5 points, these show 25.9 or more; not promoted, the model is at "
        f"{policy_of(2)}."
    )


def test_the_verdict_is_about_the_last_policy_that_was_better_and_says_where_it_is() -> None:
    second = iteration(2, "not shown", against=policy_of(1))
    said = sentence(iteration(1), second, promoted=1)
    assert said.startswith("Better: iteration 1 against the first policy wins 54.3% of 1,024 prompts")
    assert said.endswith(f"; iteration 2 is not shown to be better still; promoted, {POINTER} names {policy_of(1)}.")
    found = summary(run_data(iteration(1), second, promoted=1))["verdict"]
    assert found["outcome"] == "better" and found["promoted"] is True and found["policy_uri"] == policy_of(1)


def test_a_gain_upon_a_gain_says_what_it_stands_on() -> None:
    said = sentence(iteration(1), iteration(2, against=policy_of(1)), promoted=2)
    assert "Better: iteration 2 against iteration 1 (itself better than what the run started from) wins 54.3%" in said


def test_a_better_policy_that_a_guard_refuses_is_not_called_promoted() -> None:
    said = sentence(iteration(1, accepted=False))
    assert said.startswith("Better, and refused: iteration 1 against the first policy wins 54.3%")
    assert "; but growth in length is 0.82, the bound is 0.5; not promoted, the model is at" in said


def test_what_became_of_a_better_policy_is_told() -> None:
    def said(promotion: str, pointer_names: int = 0) -> str:
        one = iteration(1)
        one.stages["evaluate"].metrics["promotion"] = promotion
        return sentence(one, promoted=pointer_names).rpartition("; ")[2]

    place = f"the model is at {policy_of(1)}."
    assert said("promoted", 1) == f"promoted, {POINTER} names {policy_of(1)}."
    assert said("promoted", 3) == f"promoted and replaced since, {POINTER} names {policy_of(3)}, {place}"
    assert said("proposed") == f"proposed, and `dice promote` promotes it, {place}"
    moved = "not promoted: the pointer names another policy by now"
    assert said(moved) == f"{moved}, {place}"


def test_without_an_evaluation_there_is_no_verdict_and_what_is_missing_is_named() -> None:
    unfinished = IterationData(
        1, {name: iteration(1).stages[name] for name in ("generate", "score")} | {"pair": StageData()}
    )
    assert sentence(warm_start(), unfinished) == "No verdict yet: iteration 1, pair not finished."
    failed = replace(unfinished, failures=(failure("iteration-1/pair"),))
    assert sentence(failed) == "No verdict: pair failed."


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.24, "4.2 s"), (59.7, "1 min 00 s"), (5111, "1 h 25 min"), (200_000, "2 d 7 h")]
)
def test_times_are_told_in_their_two_largest_units(seconds: float, words: str) -> None:
    stages = {"train": StageData("completed", {"seconds": seconds})}
    cells = {row.words: row.cells for row in overview(columns_of(summary(run_data(IterationData(1, stages)))))}
    assert [part.text for part in cells["train"][0] if not isinstance(part, str)] == [words]


def test_a_run_in_progress_names_the_stage_that_has_not_finished() -> None:
    done = ("generate", "score")
    stages = {name: value if name in done else StageData() for name, value in iteration(1).stages.items()}
    assert status(IterationData(1, stages)) == "pair not finished"


def test_the_table_lines_up_in_a_terminal_and_ends_in_the_verdict() -> None:
    lines = summary_table(summary(run_data(warm_start(), iteration(1), promoted=1))).splitlines()
    assert len({len(line) for line in lines[:2]}) == 1
    row = next(line for line in lines if "DPO loss" in line)
    assert row.startswith("training: DPO loss on 512 training pairs, before -> after")
    assert all(line.isascii() for line in lines)
    assert lines[-1].startswith("Better: iteration 1")


def test_the_summary_is_json_and_has_both_scales_of_the_length_penalty() -> None:
    values = json.loads(json.dumps(summary(run_data(iteration(1))), allow_nan=False))["iterations"][0]
    assert values["length_penalty"] == 0.0231
    assert values["length_penalty_paper"] == pytest.approx(0.00231)
    assert values["num_filtered"] == 112
    assert values["dropped"] == {"length_limit": 61, "too_short": 3, "few_valid_responses": 48, "empty": 0}
    assert values["heldout_reward_accuracy_low"] == pytest.approx(0.606)
    assert values["seconds"]["train"] == 5111.0


def test_a_number_that_is_not_finite_is_unknown_in_the_summary() -> None:
    one = iteration(1)
    one.stages["evaluate"].metrics["drift_per_token"] = float("inf")
    values = json.loads(json.dumps(summary(run_data(one)), allow_nan=False))["iterations"][0]
    assert values["drift_per_token"] is None


def test_gpu_hours_are_those_that_every_shard_held_and_are_left_out_where_no_gpu_was() -> None:
    shards = {
        f"shard-{i}": Manifest(stage="generate", fingerprint="", files={}, metrics={"seconds": 1800.0, "num_gpus": 1})
        for i in range(4)
    }
    data = run_data(IterationData(1, {"generate": merge_shards(shards, 4), "pair": StageData()}))
    found = summary(data, gpu_hour_price=3.0)
    assert found["iterations"][0]["gpu_hours"] == {"generate": 2.0, "pair": None}
    assert found["resources"]["gpu_hours"] == 2.0 and found["resources"]["cost"] == 6.0
    assert found["resources"]["seconds"] == 1803.0  # of the slowest shard, and of prepare-data
    on_cpu = summary(run_data(IterationData(1, {"pair": StageData("completed", {"seconds": 2.0})})), gpu_hour_price=3.0)
    assert on_cpu["resources"]["gpu_hours"] is None and on_cpu["resources"]["cost"] is None


def test_verdicts_are_counted_by_the_difference_in_length() -> None:
    groups = summarise(iteration(1))["verdicts_by_length"]
    assert [(one["group"], one["win"], one["tie"], one["loss"]) for one in groups] == [
        ("shorter by more than 25%", 0, 0, 0),
        ("shorter by 5 to 25%", 0, 0, 0),
        ("about as long (within 5%)", 0, 1, 0),  # changes with the order: a tie
        ("longer by 5 to 25%", 0, 0, 0),
        ("longer by more than 25%", 1, 0, 1),
    ]


def test_the_loss_expected_at_step_0() -> None:
    assert expected_first_loss({"loss": "sigmoid", "beta": 0.1}) == pytest.approx(0.693147, abs=1e-6)
    assert expected_first_loss({"loss": "ipo", "beta": 0.5}) == 1.0
    assert expected_first_loss({"loss": "hinge"}) == 1.0
    assert expected_first_loss({"loss": "sigmoid", "sft_weight": 0.1}) is None


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
    table = summary_table(summary(data)).splitlines()
    assert table[-4:-2] == [
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
