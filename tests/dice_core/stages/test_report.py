"""Stage report: the page of a run, what KFP gets of it, and the page that compares runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dice_core.cli import main
from dice_core.settings.base import ConfigError
from dice_core.stages.report import read_summary, report, report_task
from dice_core.storage import layout
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files
from tests.synthetic_run import PLAN, evaluation, evaluation_metrics, training_lines


def stored_run(root: Path, name: str, outcome: str = "better", **plan: Any) -> str:
    """Store what a run of one iteration leaves: its plan, training, and an evaluation."""
    import numpy as np

    run_uri, scratch = layout.run(str(root), name), root / "scratch"
    scratch.mkdir(exist_ok=True)

    def publish(uri: str, stage: str, files: dict[str, str], **fields: Any) -> None:
        for file, text in files.items():
            (scratch / file).write_text(text)
        paths = {file: scratch / file for file in files}
        publish_files(uri, paths, Manifest(stage=stage, fingerprint="f", files={}, **fields))

    settings = {**PLAN, "num_iterations": 1, **plan}
    publish(layout.check_settings(run_uri), "check-settings", {}, settings=settings)
    for shard in ("generate", "score"):
        publish(layout.shard(run_uri, 1, shard, 0, 1), shard, {}, metrics={"seconds": 3.0})
    publish(layout.stage(run_uri, 1, "pair"), "pair", {}, metrics={"seconds": 1.0})
    lines = "\n".join(map(json.dumps, training_lines(8, 0.4, np.random.default_rng(1))))
    publish(
        layout.stage(run_uri, 1, "train"), "train", {"metrics.jsonl": lines}, metrics={"seconds": 7200.0, "num_gpus": 8}
    )
    found = evaluation(outcome)
    decision = {key: found["gate"][key] for key in ("outcome", "reason")} | {"accepted": 1, "promotable": 1}
    publish(
        layout.stage(run_uri, 1, "evaluate"),
        "evaluate",
        {"evaluation-abc.json": json.dumps(found)},
        metrics=evaluation_metrics(outcome) | decision,
        settings={"promoted_uri": layout.promoted(str(root), "zephyr")},
    )
    return run_uri


def artifact(path: Path) -> Any:
    return SimpleNamespace(path=str(path), metadata={})


def test_the_task_of_a_pipeline_leaves_a_page_a_table_and_few_numbers(tmp_path: Path) -> None:
    uri = stored_run(tmp_path, "march", gpu_hour_price=2.0)
    page, table, metrics = (artifact(tmp_path / name) for name in ("page.html", "table.md", "metrics"))
    report_task(str(tmp_path), "march", "id", 1, page, table, metrics, "", "zephyr")
    assert "Better: iteration 1" in (tmp_path / "table.md").read_text()
    assert metrics.metadata["win_rate"] == 0.543 and metrics.metadata["outcome"] == "better"
    assert metrics.metadata["cost"] == 32.0 and len(metrics.metadata) <= 16
    assert (tmp_path / "page.html").read_text() == (Path(uri) / "report" / "report.html").read_text()
    assert read_summary(layout.report(uri))["verdict"]["outcome"] == "better"


def test_the_report_of_a_run_that_has_nothing_leaves_a_page_and_a_table_too(tmp_path: Path) -> None:
    page, table, metrics = (artifact(tmp_path / name) for name in ("page.html", "table.md", "metrics"))
    report_task(str(tmp_path), "march", "id", 1, page, table, metrics, "", "")
    assert "No verdict yet" in (tmp_path / "table.md").read_text()
    assert metrics.metadata == {"outcome": "unfinished"}


def test_an_evaluation_of_an_earlier_version_is_a_note_and_no_crash(tmp_path: Path) -> None:
    uri = stored_run(tmp_path, "march")
    old = json.dumps({"gate": {"accepted": True, "improved": True}, "samples": [{"prompt": "?", "previous": {}}]})
    (tmp_path / "scratch" / "old.json").write_text(old)
    manifest = Manifest(stage="evaluate", fingerprint="f", files={}, metrics={"accepted": 1, "reason": "as before"})
    place = layout.stage(uri, 1, "evaluate")
    publish_files(place, {"evaluation-old.json": tmp_path / "scratch" / "old.json"}, manifest)
    report(output_uri=layout.report(uri), run_uri=uri)
    found = read_summary(layout.report(uri))
    assert found["iterations"][0]["status"] == "accepted" and found["verdict"]["outcome"] == "unfinished"
    assert found["notes"] == [f"{place}: measured by an earlier version: its gate and its answers are not shown"]


def test_runs_are_compared_by_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [stored_run(tmp_path, "march"), stored_run(tmp_path, "april", "not shown", seed=7)]
    output = str(tmp_path / "both")
    assert main(["report", "--runs", *runs, "--output", output, "--gpu-hour-price", "2.5"]) == 0
    found = read_summary(output)
    assert [run["verdict"]["outcome"] for run in found["runs"]] == ["better", "not shown"]
    assert found["settings_that_differ"] == [{"name": "seed", "values": ["42", "7"]}]
    assert found["runs"][0]["resources"]["cost"] == 40.0
    assert "DICE runs compared" in (tmp_path / "both" / "report.html").read_text()


def test_a_run_to_compare_that_is_not_there_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, missing = stored_run(tmp_path, "march"), layout.run(str(tmp_path), "april")
    assert main(["report", "--runs", here, missing, "--output", str(tmp_path / "both")]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"dice: error: {missing}: no stage of a run has finished there: give the run's own place, ROOT/runs/NAME"
    ]
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"output_uri": "ROOT/x"}, "--run, --runs: give one of them"),
        ({"run_uri": "ROOT/runs/a", "runs_uris": ["ROOT/runs/b"], "output_uri": "ROOT/x"}, "give one of them"),
        ({"runs_uris": ["ROOT/runs/a"], "output_uri": "ROOT/x"}, "--runs: must be 2 to 6 different runs, got 1"),
        ({"runs_uris": ["ROOT/runs/a"] * 2, "output_uri": "ROOT/x"}, "must be 2 to 6 different runs"),
        ({"runs_uris": ["ROOT/runs/a", "ROOT/runs/b"], "output_uri": "ROOT/runs/a/report"}, "belongs to no run"),
        ({"run_uri": "ROOT/runs/a", "output_uri": "ROOT/x", "gpu_hour_price": -1.0}, "--gpu-hour-price: must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    def placed(value: Any) -> Any:
        return (
            [placed(one) for one in value]
            if isinstance(value, list)
            else (value.replace("ROOT", str(tmp_path)) if isinstance(value, str) else value)
        )

    with pytest.raises(ConfigError, match=told):
        report(**{name: placed(value) for name, value in given.items()})


def test_a_comparison_does_not_take_the_place_of_another_stage(tmp_path: Path) -> None:
    runs = [stored_run(tmp_path, name) for name in ("march", "april")]
    publish_files(str(tmp_path / "x"), {}, Manifest(stage="train", fingerprint="", files={}))
    with pytest.raises(StorageError, match="train"):
        report(runs_uris=runs, output_uri=str(tmp_path / "x"))
