"""Where a task of a run finds what it reads, by the run's plan and by its own place."""

from typing import Any

import pytest

from dice_core.stages.place import Place
from dice_core.stages.run_settings import Task

ROOT = "s3://b/root"
RUN = f"{ROOT}/runs/r"
POLICY, REFERENCE = f"{ROOT}/models/org--policy", f"{ROOT}/models/org--reference"
PLAN = {"policy_source": "org/policy", "reference_source": "org/reference"}
PLAN |= {"judge_source": "org/judge", "reward_source": ""}


def task(place: str, sections: dict[str, dict[str, Any]] | None = None, **plan: str) -> Task:
    return Task(RUN, Place.parse(place), sections or {}, {**PLAN, **plan})


def made(iteration: int) -> str:
    return f"{RUN}/iteration-{iteration}/train"


@pytest.mark.parametrize(
    ("number", "policy", "reference", "gate"),
    [
        (1, POLICY, REFERENCE, ""),
        (2, made(1), POLICY, f"{RUN}/iteration-1/evaluate"),
        (3, made(2), made(1), f"{RUN}/iteration-2/evaluate"),
    ],
)
def test_iteration_t_samples_from_the_policy_before_and_scores_against_the_one_before_that(
    number: int, policy: str, reference: str, gate: str
) -> None:
    """pi_{t-1} is the policy, pi_{t-2} the reference, and the gate is the evaluation of the iteration before."""
    found = task(f"iteration-{number}/generate-and-score/shard-0-of-8")
    assert (found.policy_uri(found.iteration - 1), found.policy_uri(found.iteration - 2)) == (policy, reference)
    assert (found.gate_uri, found.data_uri) == (gate, f"{RUN}/data")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_iteration_knows_the_first_policy_and_what_its_dpo_started_from(number: int) -> None:
    found = task(f"iteration-{number}/evaluate")
    assert found.policy_uri(number) == made(number)
    assert (found.policy_uri(0), found.policy_uri(-1)) == (POLICY, REFERENCE)


def test_a_warm_start_makes_the_first_policy_from_the_policy_of_the_source() -> None:
    warm = task("warm-start/train", reference_source="")
    assert (warm.iteration, warm.gate_uri) == (0, "")
    # What it trains, and what its pairs are made for.
    assert warm.policy_uri(warm.iteration - 1) == POLICY
    first = task("iteration-1/train", reference_source="")
    assert (first.policy_uri(0), first.policy_uri(-1)) == (f"{RUN}/warm-start/train", POLICY)


def test_a_policy_that_another_run_made_stays_where_it_is() -> None:
    """A recurring run starts from what is promoted."""
    promoted = f"{ROOT}/runs/last-week/iteration-2/train"
    found = task("iteration-1/pair", policy_source=promoted)
    assert found.policy_uri(0) == found.imported_uri("policy") == promoted


def test_a_model_that_the_settings_do_not_use_is_none() -> None:
    uses, grades = {"judging": {"judge": "chat-logprob"}}, {"scoring": {"reward": "reward-model"}}
    assert task("iteration-1/evaluate", uses).judge_uri("judge") == f"{ROOT}/models/org--judge"
    assert task("iteration-1/evaluate", {"judging": {"judge": "none"}}).judge_uri("judge") == ""
    assert task("iteration-1/evaluate", grades).judge_uri("reward") == ""
    assert task("iteration-1/evaluate", grades, reward_source="org/r").judge_uri("reward") == f"{ROOT}/models/org--r"
