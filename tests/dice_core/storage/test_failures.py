"""Why stages failed, as the report and `make status` read it: what is known, nothing more, and few requests."""

import json
from pathlib import Path

import pytest

from dice_core.storage import layout
from dice_core.storage.failures import (
    StageFailure,
    attempt_number,
    delete_failure,
    failures_of_run,
    read_failure,
    write_failure,
)
from dice_core.storage.manifest import Manifest, publish_files
from dice_core.storage.run_contents import read_contents

# As Argo names the pods' nodes of a real run.
NODE = "dice-demo-4r7mm(0).root(0).exit-handler-1(0).iteration-1(0).train(0).executor"


def failure(**fields: object) -> StageFailure:
    values = {"stage": "train", "reason": "the loss is not finite", "is_final": True, "time": "2026-11-29T00:01:31Z"}
    return StageFailure(**(values | fields))  # type: ignore[arg-type]


def test_a_failure_is_read_as_it_was_written_until_it_is_deleted(tmp_path: Path) -> None:
    uri = str(tmp_path / "runs" / "r" / "iteration-1" / "train")
    assert read_failure(uri) is None
    write_failure(uri, failure(pod="p"))
    assert read_failure(uri) == failure(pod="p")
    delete_failure(uri)
    assert read_failure(uri) is None
    delete_failure(uri)


@pytest.mark.parametrize(
    ("node", "number", "attempt"),
    [
        (f"{NODE}(0)", (0, 0, 0, 0, 0, 0), 1),
        (f"{NODE}(2)", (0, 0, 0, 0, 0, 2), 3),
        # With Argo's retries around it, the innermost number alone does not say which attempt it is.
        (NODE.replace("train(0)", "train(1)") + "(0)", (0, 0, 0, 0, 1, 0), 0),
        ("", (), 0),
    ],
)
def test_the_attempt_is_what_the_name_of_its_node_says(node: str, number: tuple[int, ...], attempt: int) -> None:
    assert attempt_number(node) == number
    assert failure(node=node).attempt == attempt


def test_attempts_are_told_as_people_call_them() -> None:
    titles = {
        "iteration-2/train": "iteration 2: train",
        "warm-start/train": "warm start: train",
        "iteration-1/train/shard-3-of-8": "iteration 1: train 4 of 8",
        "data": "train",
        "import-model/org--name": "train org--name",
    }
    assert {place: failure(place=place).title for place in titles} == titles
    assert failure(node=f"{NODE}(1)", pod="p").where == "attempt 2, pod p"
    assert failure(node=f"{NODE}(1)").workflow == "dice-demo-4r7mm"
    assert (failure().where, failure().workflow) == ("", "")


def test_the_failures_of_a_run_are_found_wherever_they_lie_and_those_of_other_runs_are_not(tmp_path: Path) -> None:
    root = str(tmp_path)
    run, other = layout.run(root, "a"), layout.run(root, "ab")
    write_failure(layout.shard(run, 1, "generate", 3, 8), failure(stage="generate"))
    write_failure(layout.check_settings(run), failure(stage="check-settings"))
    write_failure(layout.import_for_run(run, layout.model(root, "Org/Name")), failure(stage="import-model"))
    write_failure(layout.data(other), failure(stage="prepare-data"))
    assert [found.title for found in failures_of_run(run)] == [
        "check-settings",
        "import-model org--name",
        "iteration 1: generate 4 of 8",
    ]
    assert failures_of_run(layout.run(root, "nothing")) == []


def test_a_reason_of_another_version_is_read_or_left_out_and_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = layout.run(str(tmp_path), "a")
    write_failure(layout.data(run), failure())
    path = Path(layout.data(run)) / "failure.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": {"field": 1}}))
    assert [found.reason for found in failures_of_run(run)] == ["the loss is not finite"]
    # What version 0.1.0 wrote beside a training job.
    path.write_text(json.dumps({"run": "uid", "cause": "training failed", "time": 1.5}))
    assert failures_of_run(run) == [] and read_failure(layout.data(run)) is None
    assert "failure.json: not a reason that this version" in capsys.readouterr().err


def test_the_contents_of_a_run_are_its_stages_and_not_the_checkpoints_of_one(tmp_path: Path) -> None:
    run = layout.run(str(tmp_path), "a")
    places = [layout.data(run), layout.shard(run, 1, "score", 0, 2), f"{layout.stage(run, 1, 'train')}/checkpoints/c-1"]
    for uri in places:
        publish_files(uri, {}, Manifest(stage="s", fingerprint="f", files={}))
    write_failure(layout.stage(run, 1, "train"), failure())
    found = read_contents(run)
    assert set(found.manifests) == {"data", "iteration-1/score/shard-0-of-2"}
    assert [failure.place for failure in found.failures] == ["iteration-1/train"]
    assert found.manifest(layout.data(run)) == found.manifests["data"]
    assert found.manifest(layout.stage(run, 1, "pair")) is None
    assert found.keys_below(layout.stage(run, 1, "score")) == ["shard-0-of-2/manifest.json"]


@pytest.mark.slow
def test_a_run_on_s3_is_read_with_one_listing(s3: str) -> None:
    run = layout.run(s3, "a")
    publish_files(layout.data(run), {}, Manifest(stage="prepare-data", fingerprint="f", files={}))
    write_failure(layout.stage(run, 1, "train"), failure())
    found = read_contents(run)
    assert found.keys == ("data/manifest.json", "iteration-1/train/failure.json")
    assert list(found.failures) == failures_of_run(run)
