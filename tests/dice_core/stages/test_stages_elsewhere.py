"""A report on single stages whose results lie anywhere: iterations and shards follow from what they were made of."""

import json
from pathlib import Path

import pytest

from dice_core.stages.report import report
from dice_core.stages.stages_elsewhere import gathered
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, publish_files


def publish(place: Path, stage: str, *inputs: Path, metrics: dict[str, int] | None = None, **settings: int) -> str:
    """Publish a result without files; an input stands in its manifest by its address."""
    made_from = {f"input/{i}": f"{uri}@digest" for i, uri in enumerate(inputs)}
    manifest = Manifest(
        stage=stage, fingerprint="f", files={}, inputs=made_from, settings=dict(settings), metrics=metrics or {}
    )
    publish_files(str(place), {}, manifest)
    return str(place)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the results of two iterations, under names of a person's own."""
    publish(tmp_path / "prepared", "prepare-data", metrics={"num_prompts": 7})
    for t in (1, 2):
        for shard in (0, 1):
            answers, scores = tmp_path / f"answers{t}{shard}", tmp_path / f"scores{t}{shard}"
            publish(answers, "generate", tmp_path / "prepared", iteration=t, shard=shard, num_shards=2)
            publish(scores, "score", answers, metrics={"num_scored": 10 * t + shard})
        publish(tmp_path / f"best{t}", "pair", tmp_path / f"scores{t}0", tmp_path / f"scores{t}1", iteration=t)
        publish(tmp_path / f"model{t}", "train", tmp_path / f"best{t}", metrics={"num_steps": t}, iteration=t)
    return tmp_path


def test_results_are_found_their_iteration_and_shard(folder: Path) -> None:
    contents = gathered([str(path) for path in sorted(folder.iterdir(), reverse=True)])
    assert sorted(contents.addresses) == sorted(
        [
            "data",
            *(f"iteration-{t}/{name}/shard-{i}-of-2" for t in (1, 2) for name in ("generate", "score") for i in (0, 1)),
            *(f"iteration-{t}/{name}" for t in (1, 2) for name in ("pair", "train")),
        ]
    )
    assert contents.addresses["iteration-2/train"] == f"{folder}/model2"
    assert {contents.addresses[f"iteration-2/score/shard-{i}-of-2"] for i in (0, 1)} == {
        f"{folder}/scores20",
        f"{folder}/scores21",
    }


def test_a_page_of_stages_shows_what_they_made(folder: Path) -> None:
    out = folder / "page"
    names = ("prepared", "scores10", "scores11", "best1", "model1", "model2/")
    report(output_uri=str(out), stages_uris=[f"{folder}/{name}" for name in names])
    first, second = json.loads((out / "summary.json").read_text())["iterations"]
    assert first["num_scored"] == 21
    assert (first["num_steps"], second["num_steps"]) == (1, 2)
    assert "single stages" in (out / "report.html").read_text()


def test_what_is_no_stage_of_a_report_or_one_twice_is_refused(folder: Path) -> None:
    publish(folder / "base", "import-model")
    with pytest.raises(UnfitError, match="base: holds the result of import-model, which a report does not show"):
        gathered([str(folder / "base")])
    with pytest.raises(UnfitError, match=r"nothing: no manifest\.json there"):
        gathered([str(folder / "nothing")])
    publish(folder / "again", "train", iteration=1)
    with pytest.raises(UnfitError, match=r"again: the iteration 1: train lies at .*/model1 already"):
        gathered([str(folder / "model1"), str(folder / "again")])
