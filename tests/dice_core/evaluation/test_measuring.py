"""The arithmetic of an evaluation by hand, and what the gate makes of simulated candidates."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from dice_core.evaluation import result
from dice_core.evaluation.measuring import PairLogps, refused_unmeasured, summarise
from dice_core.evaluation.result import Answer, ComparedWith, Evaluation, Sample
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.judges.verdicts import MISSING, TIE, Verdict

Floats = NDArray[np.float64]

CONFIG = EvaluationConfig(max_accuracy_drop=0.3, max_length_growth=0.5)
COMPARED_WITH = ComparedWith("s3://models/incumbent", "promoted model", "s3://promoted/demo.json", "ab")


def sample(incumbent: str, policy: str, verdict: Verdict | None = None, number: int = 0) -> Sample:
    new, old = Answer(policy, False, 10, reward=2.0), Answer(incumbent, False, 10, reward=0.5)
    return Sample(f"id-{number}", "?", old, new, verdict)


SAMPLES = [sample("a" * 10, "b" * 12), sample("c" * 20, "d" * 18)]
BASE = np.zeros((4, 2))


def measure(
    policy: Floats = BASE, incumbent: Floats = BASE, samples: list[Sample] = SAMPLES, judge: str = "none"
) -> Evaluation:
    pairs = PairLogps(policy=policy, incumbent=incumbent, previous=incumbent, base=np.zeros_like(policy))
    return summarise(pairs, samples, CONFIG, judge=judge, seed=3)


def test_accuracies_margins_and_their_change_by_hand() -> None:
    policy = np.array([[-1.0, -2.0], [-3.0, -1.0], [-1.0, -4.0], [-2.0, -2.5]])  # margins 1, -2, 3, 0.5
    incumbent = np.array([[-1.0, -2.0], [-3.0, -1.0], [-4.0, -1.0], [-2.0, -2.0]])  # margins 1, -2, -3, 0
    metrics = measure(policy, incumbent).metrics()
    assert metrics["heldout_reward_accuracy"] == 0.75
    assert metrics["heldout_reward_accuracy_incumbent"] == pytest.approx(0.375)
    assert metrics["heldout_reward_accuracy_change"] == pytest.approx(0.375)
    assert metrics["heldout_reward_margin"] == pytest.approx(0.625)
    assert metrics["heldout_step_margin"] == pytest.approx((0 + 0 + 6 + 0.5) / 4)
    assert metrics["num_heldout_ties_incumbent"] == 1
    assert metrics["mean_response_characters"] == metrics["mean_response_characters_incumbent"] == 15
    assert metrics["drift_per_token"] == pytest.approx(0.2)


def test_the_previous_policy_need_not_be_the_incumbent() -> None:
    better, worse = np.tile([-1.0, -2.0], (4, 1)), np.tile([-2.0, -1.0], (4, 1))
    pairs = PairLogps(policy=better, incumbent=worse, previous=better, base=BASE)
    before = [Answer("a" * 6, False), Answer("b" * 4, True)]
    found = summarise(pairs, SAMPLES, CONFIG, previous=before)
    metrics = found.metrics()
    assert metrics["heldout_reward_accuracy_incumbent"] == 0
    assert metrics["heldout_reward_accuracy_previous"] == 1
    assert metrics["heldout_reward_accuracy_change_previous"] == 0
    assert (metrics["mean_response_characters_previous"], metrics["response_characters_growth_previous"]) == (5, 2)
    assert (metrics["share_cut_responses_previous"], metrics["share_cut_responses_change_previous"]) == (0.5, -0.5)
    assert found.gate.rule("length_growth").value == 2 and found.gate.rule("incumbent_length_growth").value == 0
    assert metrics["heldout_step_accuracy"] == 0.5, "all tie"


def test_one_pair_of_four_decides_nothing() -> None:
    better = np.tile([-1.0, -2.0], (4, 1))
    worse = np.array([[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0], [-2.0, -1.0]])
    for policy, incumbent in ((worse, better), (better, worse)):
        found = measure(policy, incumbent)
        assert (found.accepted, found.promotable, found.gate.outcome) == (True, False, "not shown")
    # errors of 4 pairs, two added: sqrt(1 + 1 - 1 / 6) / 6 = 0.2257; 2.80 of them, and 4 points by 2.80 x 0.553 squared
    reason = measure(worse, better).gate.reason
    assert "accuracy 100.0 % -> 75.0 % (-25.0 points (-69.2 to +19.2), 4 pairs)" in reason
    assert "4 held-out pairs show a difference of 77.4 points in 80 % of runs, 4 points would take 1,499" in reason


def test_a_policy_with_log_probs_that_are_no_numbers_is_refused() -> None:
    found = measure(np.array([[math.nan, -1.0], [-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]]))
    assert not found.accepted and found.gate.reason == "log-probs of 1 held-out pairs are not finite numbers"
    assert found.counts["num_held_out_pairs"] == 3


def test_numbers_that_could_not_be_measured_are_left_out_of_the_metrics() -> None:
    nothing = np.full((4, 2), math.nan)
    empty = [replace(one, incumbent=Answer("", False), policy=replace(one.policy, reward=None)) for one in SAMPLES]
    metrics = measure(BASE, nothing, empty).metrics()
    absent = {"heldout_reward_accuracy", "response_characters_growth", "drift_per_token", "win_rate"}
    assert not absent & set(metrics)
    assert all(isinstance(value, str) or math.isfinite(value) for value in metrics.values())


VERDICTS = [Verdict(1.0, 0.8), Verdict(0.9, 0.2), Verdict(0.2, 0.1), MISSING, None]


def judged_samples() -> list[Sample]:
    """A win, a flip, a loss, one missing, one that nobody was asked for; and both models saying the same twice."""
    asked = [sample(f"old {n}", f"new {n}, longer", verdict, n) for n, verdict in enumerate(VERDICTS)]
    same = [sample("same", "same", TIE, 10), sample("same", "same", None, 11)]
    return asked + same


def test_verdicts_are_counted_by_hand() -> None:
    metrics = measure(samples=judged_samples(), judge="reward-model").metrics()
    assert metrics["win_rate"] == pytest.approx((0.9 + 0.55 + 0.15 + 0.5 + 0.5) / 5)
    assert [metrics[f"num_{name}"] for name in ("wins", "ties", "losses")] == [1, 3, 1]
    assert (metrics["num_judged_prompts"], metrics["num_missing_verdicts"], metrics["num_same_answers"]) == (5, 2, 2)
    assert metrics["share_parsed_verdicts"] == pytest.approx(0.6), "3 of the 5 that differ"
    assert metrics["flip_rate"] == pytest.approx(1 / 3)
    assert metrics["sign_test_p"] == 1
    # The candidate's rewards are all higher: the judge's two wins by the mean agree, its loss does not.
    assert metrics["reward_judge_agreement"] == pytest.approx(2 / 3)


def test_missing_verdicts_are_no_wins_and_bar_a_promotion() -> None:
    gate = measure(samples=judged_samples(), judge="reward-model").gate
    assert gate.rule("parsed_verdicts").passed is False and not gate.promotable
    assert gate.rule("parsed_verdicts").sentence.startswith("the judge gave a verdict on 60.0 % of the comparisons")


def test_a_judge_that_always_says_the_first_is_better_gives_one_half_and_flips_always() -> None:
    always = [sample(f"old {n}", f"new {n}", Verdict(0.9, 0.1), n) for n in range(40)]
    found = measure(samples=always, judge="chat-logprob")
    metrics = found.metrics()
    assert (metrics["win_rate"], metrics["flip_rate"], metrics["num_ties"]) == (0.5, 1.0, 40)
    assert found.gate.outcome == "not shown"


def test_swapping_the_models_turns_both_win_rates_into_one_minus_them() -> None:
    random = np.random.default_rng(0)
    there = [
        sample("o" * length, "n" * other, Verdict(*(random.integers(0, 65, 2) / 64)), n)
        for n, (length, other) in enumerate(random.integers(1, 200, (30, 2)))
    ]
    back = [replace(s, incumbent=s.policy, policy=s.incumbent, verdict=s.verdict.swapped()) for s in there if s.verdict]
    one, other = (measure(samples=samples, judge="reward-model").metrics() for samples in (there, back))
    assert other["win_rate"] == 1 - float(one["win_rate"])
    assert other["length_controlled_win_rate"] == pytest.approx(1 - float(one["length_controlled_win_rate"]), abs=1e-6)
    assert (one["num_wins"], one["num_losses"]) == (other["num_losses"], other["num_wins"])


@pytest.mark.parametrize("judge", ["none", "reward-model"])
def test_what_is_written_is_plain_json_and_every_number_of_it_is_explained(judge: str) -> None:
    found = measure(samples=judged_samples(), judge=judge)
    written = json.loads(json.dumps(found.to_dict(COMPARED_WITH), allow_nan=False))
    assert set(written) | {"seconds"} == {"metrics", "gate", "judging", "compared_with", "samples", "seconds"}
    assert result.__doc__ is not None
    words = set(re.findall(r"\w+", result.__doc__))
    for name in written["metrics"]:
        stems = {name, *(name.removesuffix(end) for end in ("_low", "_high", "_se"))}
        assert stems & words, f"{name} is not explained"
    for part in ("gate", "judging", "compared_with"):
        assert set(written[part]) <= words
    assert set(written["gate"]["rules"][0]) <= words
    assert {*written["samples"][0], *written["samples"][0]["policy"]} <= words
    assert written["samples"][1]["verdict"] == {
        "candidate_first": 0.9,
        "candidate_second": 0.2,
        "preference": pytest.approx(0.55),
        "flipped": True,
    }


def test_what_kfp_shows_are_numbers_of_the_result() -> None:
    metrics = measure(samples=judged_samples(), judge="reward-model").metrics()
    assert set(result.SHOWN) <= set(metrics)
    assert len(result.SHOWN) <= 15 and all(isinstance(metrics[name], int | float) for name in result.SHOWN)


def test_a_policy_that_cannot_be_sampled_from_is_refused_with_its_reason() -> None:
    found = refused_unmeasured("tensor 'x' is broken", CONFIG, judge="reward-model")
    assert not found.accepted and not found.promotable and found.gate.reason == "tensor 'x' is broken"
    assert found.gate.warnings[-1] == "no answers were sampled"
    json.dumps(found.to_dict(COMPARED_WITH), allow_nan=False)


# -- simulated candidates ------------------------------------------------------------------------------------------


def margins(shift: float, num: int, random: np.random.Generator) -> Floats:
    """Return log-probs whose margins are those of pairs that differ in difficulty, moved by the training."""
    margin = random.normal(0.5, 2.0, num) + shift
    return np.stack([margin, np.zeros(num)], axis=1)


def conversations(
    num: int, random: np.random.Generator, *, quality: float = 0.0, longer: float = 1.0, likes_length: float = 0.0
) -> list[Sample]:
    """Return judged answers: the judge sees quality, noise and length."""
    lengths = np.exp(random.normal(np.log(400), 0.4, (2, num)))
    new, old = (lengths * [[longer], [1.0]]).astype(int)
    noise = random.normal(0, 1.5, (2, num))
    preferences = 1 / (1 + np.exp(-(noise + quality + likes_length * np.log(new / old))))
    return [
        Sample(
            f"id-{n}",
            "?",
            Answer("o" * int(old[n]), False, int(old[n]) // 4, 0.0),
            # No two answers are alike.
            Answer(f"{n}" + "n" * int(new[n]), False, int(new[n]) // 4, 0.02 * int(new[n]) // 4),
            Verdict(*preferences[:, n]),
        )
        for n in range(num)
    ]


@pytest.mark.parametrize("num_pairs", [16, 256])
def test_an_unchanged_model_is_promoted_in_one_of_twenty_runs_at_most_where_nobody_judges(num_pairs: int) -> None:
    random = np.random.default_rng(num_pairs)
    promoted = 0
    for _ in range(2000):
        noise = random.normal(0, 0.5, (2, num_pairs, 2))
        both = margins(0.0, num_pairs, random) + noise
        promoted += measure(both[0], both[1], SAMPLES).promotable
    assert promoted <= 0.05 * 2000


@pytest.mark.slow
@pytest.mark.parametrize("num_prompts", [20, 100])
def test_an_unchanged_model_is_promoted_in_one_of_twenty_runs_at_most_where_a_judge_decides(num_prompts: int) -> None:
    random = np.random.default_rng(num_prompts)
    found = [measure(samples=conversations(num_prompts, random), judge="reward-model") for _ in range(200)]
    assert sum(one.promotable for one in found) <= 0.05 * 200
    assert sum(one.estimates["win_rate"].value > 0.5 for one in found) > 0.4 * 200, "whom a point estimate promotes"


def test_a_better_candidate_is_promoted() -> None:
    found = measure(samples=conversations(400, np.random.default_rng(0), quality=0.5), judge="reward-model")
    assert found.promotable and found.gate.outcome == "better"


def test_a_noised_candidate_is_worse_by_its_win_rate() -> None:
    random = np.random.default_rng(0)
    found = measure(samples=conversations(400, random, quality=-0.5), judge="reward-model")
    assert found.gate.outcome == "worse" and not found.promotable
    assert found.gate.rule("win_rate").passed is False and found.gate.reason.startswith("worse: win rate ")


def test_a_noised_candidate_is_refused_by_its_accuracy_where_nobody_judges() -> None:
    random = np.random.default_rng(0)
    incumbent = margins(2.0, 256, random)
    found = measure(incumbent + random.normal(0, 8, (256, 2)), incumbent)
    assert found.gate.outcome == "worse" and not found.promotable
    assert found.gate.rule("accuracy_gain").passed is False


def test_a_longer_winded_candidate_that_a_judge_of_length_likes_is_barred_by_the_win_rate_at_equal_lengths() -> None:
    random = np.random.default_rng(0)
    liked = conversations(400, random, longer=1.35, likes_length=3.0)
    gate = measure(samples=liked, judge="reward-model").gate
    assert gate.accepted and not gate.promotable and gate.outcome == "not shown"
    assert gate.rule("win_rate").passed is True
    assert [rule.name for rule in gate.rules if not rule.passed] == ["length_controlled_win_rate"]


def test_a_candidate_that_has_doubled_its_answers_is_refused_by_their_growth() -> None:
    random = np.random.default_rng(0)
    gate = measure(samples=conversations(400, random, quality=1.0, longer=2.0), judge="reward-model").gate
    assert not gate.accepted and gate.reason.startswith("answers grew by 9")
    assert [rule.name for rule in gate.rules if rule.passed is False] == ["length_growth"]
