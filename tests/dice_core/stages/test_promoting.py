"""What follows from an evaluation: a pointer that moves, a proposal, or neither; and the card of the model."""

import pytest

from dice_core.evaluation.settings import EvaluationConfig
from dice_core.release.model_card import CARD
from dice_core.stages.promoting import settle
from dice_core.stages.runner import Input
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.manifest import require_manifest
from dice_core.storage.promotion import promote, read_promotion, read_promotion_history
from tests.finished_run import BETTER, NOT_SHOWN, FinishedRun


@pytest.fixture
def run(tmp_path):
    return FinishedRun(str(tmp_path))


def settled(run, number, verdict, *, incumbent="", pointer=None, **config):
    """Settle what an evaluation found, as a stage does that stores its manifest afterwards."""
    policy = run.iterate(number)
    return settle(
        Input(policy, require_manifest(policy)),
        evaluated_uri=layout.stage(run.uri, number, "evaluate"),
        previous_uri="before",
        incumbent=incumbent,
        iteration=number,
        verdict=verdict,
        is_promotable=bool(verdict["promotable"]),
        promoted_uri=run.pointer if pointer is None else pointer,
        config=EvaluationConfig.parse(config, "evaluation"),
    )


def test_a_better_policy_is_promoted_with_its_numbers(run):
    assert settled(run, 1, BETTER, registered_model="aligned") == "promoted"
    found = read_promotion(run.pointer)
    assert (found.policy_uri, found.reference_uri) == (layout.stage(run.uri, 1, "train"), "before")
    [entry] = read_promotion_history(run.pointer).entries
    assert (entry.verdict["win_rate"], entry.registered_model, entry.how) == (0.58, "aligned", "auto")


def test_one_that_is_not_shown_to_be_better_is_not(run):
    assert settled(run, 1, NOT_SHOWN) == "not promoted: the gate does not say so"
    assert settled(run, 2, BETTER, pointer="") == "not promoted: the run moves no pointer"
    assert read_promotion(run.pointer) is None and read_promotion_history(run.pointer).entries == ()


def test_a_person_is_asked_where_the_settings_say_so(run):
    assert settled(run, 1, BETTER, promote="manual") == "proposed"
    assert read_promotion(run.pointer) is None
    proposal = read_promotion_history(run.pointer).open_proposal()
    assert (proposal.policy_uri, proposal.verdict["win_rate"]) == (layout.stage(run.uri, 1, "train"), 0.58)


def test_a_pointer_that_moved_since_the_comparison_stays_and_is_told(run):
    promote(run.pointer, "others", "77", evaluated="e", iteration=1)
    told = settled(run, 1, BETTER, incumbent="")
    assert told.startswith(f"not promoted: {run.pointer}: names others by now, which ")
    assert read_promotion(run.pointer).policy_uri == "others"
    assert settled(run, 2, BETTER, incumbent="77") == "promoted"


def test_the_card_of_the_policy_tells_in_either_case(run):
    for number, verdict in ((1, BETTER), (2, NOT_SHOWN)):
        settled(run, number, verdict)
        text = open_storage(layout.stage(run.uri, number, "train")).read_bytes(CARD).decode()
        assert verdict["reason"] in text


def test_a_settled_evaluation_can_be_settled_again(run):
    """Another attempt of the stage, killed before its manifest."""
    policy = run.iterate(1)
    for _ in range(2):
        outcome = settle(
            Input(policy, require_manifest(policy)),
            evaluated_uri="e",
            previous_uri="before",
            incumbent="",
            iteration=1,
            verdict=BETTER,
            is_promotable=True,
            promoted_uri=run.pointer,
            config=EvaluationConfig(),
        )
        assert outcome == "promoted"
    assert len(read_promotion_history(run.pointer).entries) == 1
