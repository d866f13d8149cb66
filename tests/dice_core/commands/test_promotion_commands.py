"""`dice promote`, `dice rollback` and `dice history`: what a person does with a pointer, and what is refused."""

import json
from pathlib import Path

import pytest

from dice_core import cli
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.promotion import Evidence, promote, propose, read_promotion, read_promotion_history
from tests.finished_run import BETTER, NOT_SHOWN, REFUSED, FinishedRun, digest_of, publish


@pytest.fixture
def run(tmp_path):
    return FinishedRun(str(tmp_path))


@pytest.fixture
def dice(capsys):
    def call(*words):
        code = cli.main(list(words))
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("dice: error: ")]
        assert (code, len(lines)) in ((0, 0), (1, 1)), err
        return out.rstrip("\n") if code == 0 else lines[0].removeprefix("dice: error: ")

    return call


def test_a_person_promotes_a_policy_on_the_evaluation_beside_it(run, dice):
    policy = run.iterate(1, BETTER)
    assert dice("promote", "--pointer", run.pointer, "--policy", policy) == f"{run.pointer} names {policy}"
    found = read_promotion(run.pointer)
    assert (found.policy_uri, found.iteration) == (policy, 1)
    assert found.reference_uri == layout.model(run.root, "org/zephyr-dpo")
    assert found.evaluated == layout.stage(run.uri, 1, "evaluate")
    (entry,) = read_promotion_history(run.pointer).entries
    assert (entry.how, entry.is_forced, entry.verdict["win_rate"], entry.run) == ("manual", False, 0.58, "march")
    assert "@" in entry.by
    assert "already named" in dice("promote", "--pointer", run.pointer, "--policy", policy)
    assert len(read_promotion_history(run.pointer).entries) == 1


def test_without_a_policy_it_is_the_open_proposal(run, dice):
    assert "no proposal is open" in dice("promote", "--pointer", run.pointer)
    policy = run.iterate(1, BETTER)
    evaluated = layout.stage(run.uri, 1, "evaluate")
    propose(run.pointer, policy, digest_of(run.policy), evaluated=evaluated, iteration=1)
    assert json.loads(dice("promote", "--pointer", run.pointer, "--json"))["policy_uri"] == policy
    assert read_promotion(run.pointer).evaluated == evaluated
    assert "no proposal is open" in dice("promote", "--pointer", run.pointer)


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        (None, "no evaluation names it, run `dice evaluate` or give --evaluation"),
        (REFUSED, "/iteration-1/evaluate refused it (answers grew by 82.0%)"),
        (NOT_SHOWN, "/iteration-1/evaluate does not show that it is better (win rate 51.0% [47.0, 55.0])"),
        ({"accepted": 1, "improved": 0, "reason": "no gain"}, "does not show that it is better (no gain)"),
    ],
)
def test_a_policy_without_a_good_verdict_needs_force_and_a_reason_that_is_kept(verdict, why, run, dice):
    options = ("promote", "--pointer", run.pointer, "--policy", run.iterate(1, verdict))
    assert why in dice(*options)
    assert "--force --reason TEXT" in dice(*options)
    assert "needs --reason" in dice(*options, "--force") and "needs --reason" in dice(
        *options, "--force", "--reason", " "
    )
    assert read_promotion(run.pointer) is None and not Path(run.pointer).parent.exists()
    dice(*options, "--force", "--reason", "judged by hand")
    (entry,) = read_promotion_history(run.pointer).entries
    assert (entry.is_forced, entry.reason) == (True, "judged by hand")
    assert read_promotion(run.pointer).reference_uri, "a recurring run can start from it"


def test_what_is_no_finished_policy_is_refused_with_force_too(run, dice):
    policy = run.iterate(1, BETTER)
    forced = ("promote", "--pointer", run.pointer, "--force", "--reason", "r", "--policy")
    assert "no manifest.json there" in dice(*forced, f"{run.uri}/iteration-2/train")
    pairs = layout.stage(run.uri, 1, "pair")
    assert "holds no model but the result of pair" in dice(*forced, pairs)
    publish(policy, "train", run.files(9))
    assert "not the policy that was evaluated" in dice(*forced, policy)
    publish(policy, "train", skipped="the gate refused")
    assert "holds no model: its stage was skipped (the gate refused)" in dice(*forced, policy)
    assert "holds a result of pair" in dice(*forced, run.root + "/models/org--zephyr-dpo", "--evaluation", pairs)
    assert read_promotion(run.pointer) is None


def test_a_verdict_against_another_policy_than_the_promoted_one_is_refused(run, dice):
    """Iteration 1 was promoted meanwhile, and iteration 2 was compared with what was there before."""
    start = run.policy
    first = run.iterate(1, BETTER, incumbent=start)
    second = run.iterate(2, BETTER, incumbent=start)
    assert "names" in dice("promote", "--pointer", run.pointer, "--policy", first)
    assert "another policy than the pointer names" in dice("promote", "--pointer", run.pointer, "--policy", second)


def test_an_imported_model_is_the_first_policy_by_a_persons_word_and_with_its_reference(run, dice):
    model = layout.model(run.root, "org/zephyr-dpo")
    words = ("promote", "--pointer", run.pointer, "--policy", model, "--force", "--reason", "the start")
    dice(*words, "--reference", "s3://bucket/models/sft")
    assert read_promotion(run.pointer).reference_uri == "s3://bucket/models/sft"


def test_the_way_back_and_the_history_of_it_all(run, dice):
    assert dice("history", "--pointer", run.pointer) == f"{run.pointer}: nothing is promoted"
    first, second = run.iterate(1, BETTER), run.iterate(2, BETTER)
    dice("promote", "--pointer", run.pointer, "--policy", first)
    before = Path(run.pointer).read_bytes()
    dice("promote", "--pointer", run.pointer, "--policy", second)
    assert dice("rollback", "--pointer", run.pointer, "--reason", "it rambles").endswith("again, as after entry 1")
    assert Path(run.pointer).read_bytes() == before
    dice("promote", "--pointer", run.pointer, "--policy", run.iterate(3, REFUSED), "--force", "--reason", "try")
    lines = dice("history", "--pointer", run.pointer).splitlines()
    assert lines[0].split() == ["#", "when", "(UTC)", "how", "state", "policy", "verdict", "by"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "*"]
    assert "rollback" in lines[3] and f"{first} better, win rate 0.580 [0.540, 0.620]" in " ".join(lines[3].split())
    assert '"it rambles"' in lines[3]
    assert "manual, forced current" in " ".join(lines[4].split()) and '"try"' in lines[4]
    values = json.loads(dice("history", "--pointer", run.pointer, "--json"))
    assert [entry["state"] for entry in values["entries"]] == ["replaced", "replaced", "replaced", "current"]
    assert values["current"]["policy_uri"] == values["entries"][3]["policy_uri"]
    assert "entry 9" in dice("rollback", "--pointer", run.pointer, "--to", "9")


def test_a_pointer_without_history_is_shown_as_what_it_is(run, dice):
    policy = run.iterate(1, BETTER)
    text = json.dumps({"policy_uri": policy, "content_digest": "c", "evaluated": "e", "iteration": 1})
    open_storage(f"{run.root}/promoted").write_bytes("zephyr.json", text.encode())
    assert dice("history", "--pointer", run.pointer) == f"* {run.pointer} names {policy}, which no entry says"


def test_an_accuracy_is_the_evidence_where_nobody_judged(run, dice):
    evidence = Evidence(verdict={"accepted": 1, "heldout_reward_accuracy": 0.6875})
    promote(run.pointer, run.iterate(1), digest_of(run.policy), evaluated="", iteration=1, evidence=evidence)
    assert "accepted, accuracy 0.688" in dice("history", "--pointer", run.pointer)
