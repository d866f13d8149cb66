"""MLflow's registry follows the pointer, on a real `mlflow server`; one that is away stops nobody."""

import os
import uuid

import pytest

from dice_core import cli
from dice_core.release.mlflow_registry import register, register_or_tell
from dice_core.storage import layout
from dice_core.storage.promotion import Evidence, promote, propose, read_promotion, roll_back
from dice_core.tracking.run_tracking import tracked_stage
from tests.finished_run import BETTER, FinishedRun, digest_of
from tests.mlflow_server import MlflowServer


@pytest.fixture
def pointer(s3, tmp_path):
    """A pointer of a name of its own, which is that of its registered model."""
    return layout.promoted(f"{s3}/{tmp_path.name}", f"m-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def run(s3, tmp_path):
    return FinishedRun(f"{s3}/{tmp_path.name}")


@pytest.fixture
def server(mlflow_server: MlflowServer, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"test-{uuid.uuid4().hex[:8]}")
    return mlflow_server


def step(pointer, run, number, move=promote, **evidence):
    policy = run.iterate(number, BETTER)
    evaluated = layout.stage(run.uri, number, "evaluate")
    move(
        pointer,
        policy,
        digest_of(run.policy),
        evaluated=evaluated,
        iteration=number,
        evidence=Evidence(verdict=BETTER, **evidence),
    )
    return policy


def alias(server, pointer, name):
    """Return the source of what an alias names."""
    model = pointer.rpartition("/")[2].removesuffix(".json")
    return server.get("registered-models/alias", name=model, alias=name)["model_version"]


@pytest.mark.slow
def test_the_champion_is_what_the_pointer_names_by_address_with_its_evidence(server, pointer, run):
    policy = step(pointer, run, 1)
    told = register_or_tell(pointer)
    assert told.endswith(f"in the registry of {server.uri}: champion is version 1")
    version = alias(server, pointer, "champion")
    assert version["source"] == policy
    tags = {tag["key"]: tag["value"] for tag in version["tags"]}
    assert tags["dice.content_digest"] == digest_of(run.policy)
    assert (tags["dice.run"], tags["dice.iteration"], tags["dice.verdict.win_rate"]) == ("march", "1", "0.58")
    assert version["description"] == "iteration 1 of run march: win rate 58.0% [54.0, 62.0]"
    # Again it is the same version, and a rollback is that of before.
    assert register(pointer).champion == "1"
    step(pointer, run, 2)
    assert register(pointer).champion == "2"
    roll_back(pointer)
    assert register(pointer).champion == "1"
    assert alias(server, pointer, "champion")["source"] == policy


@pytest.mark.slow
def test_a_proposal_is_the_challenger_until_a_person_has_promoted_it(server, pointer, run, capsys):
    step(pointer, run, 1)
    proposed = step(pointer, run, 2, propose)
    assert (register(pointer).champion, register(pointer).challenger) == ("1", "2")
    assert alias(server, pointer, "challenger")["source"] == proposed
    assert cli.main(["promote", "--pointer", pointer]) == 0
    assert "champion is version 2" in capsys.readouterr().err
    assert alias(server, pointer, "champion")["source"] == proposed
    with pytest.raises(AssertionError, match="challenger"):
        alias(server, pointer, "challenger")


@pytest.mark.slow
def test_a_version_leads_to_the_training_that_made_it(server, pointer, run):
    with tracked_stage("train", layout.stage(run.uri, 1, "train"), "f", {}):
        pass
    step(pointer, run, 1, registered_model="the aligned one")
    assert register(pointer).model == "the aligned one"
    version = server.get("registered-models/alias", name="the aligned one", alias="champion")["model_version"]
    experiment = os.environ["MLFLOW_EXPERIMENT_NAME"]
    trained = [found for found in server.runs(experiment) if found["run_name"] == "iteration-1/train"]
    assert [version["run_id"]] == [found["run_id"] for found in trained]


def test_a_registry_that_is_away_is_told_with_the_command_that_makes_up_for_it(pointer, run, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    policy = run.iterate(1, BETTER)
    assert cli.main(["promote", "--pointer", pointer, "--policy", policy]) == 0
    out, err = capsys.readouterr()
    assert read_promotion(pointer).policy_uri == policy and policy in out
    assert (
        f"the model registry does not say so yet: no answer (ConnectionError): `dice register --pointer {pointer}`"
        in err
    )
    assert "secret" not in err
    assert cli.main(["register", "--pointer", pointer]) == 1
    assert capsys.readouterr().err == "dice: error: no answer (ConnectionError)\n"


def test_without_a_registry_nothing_is_said_and_the_command_says_what_to_set(pointer, run, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    step(pointer, run, 1)
    capsys.readouterr()
    assert register_or_tell(pointer) == "" and capsys.readouterr().err == ""
    assert cli.main(["register", "--pointer", pointer]) == 1
    assert "MLFLOW_TRACKING_URI: is not set" in capsys.readouterr().err
