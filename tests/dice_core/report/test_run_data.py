"""What a report is made of: shards merged, values binned, and a stored run read back."""

import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dice_core.data import records
from dice_core.report.page import build_report
from dice_core.report.run_data import Histogram, histogram, merge_shards
from dice_core.report.summary import status, summary
from dice_core.report.table import summary_table
from dice_core.stages.report import read_run, update_report
from dice_core.storage import layout
from dice_core.storage.manifest import Manifest, publish_files


def test_a_histogram_keeps_every_value_and_squeezes_no_bin_for_an_outlier() -> None:
    values = np.append(np.linspace(0, 1, 999), 1e9)
    found = histogram({"all": values, "chosen": [0.5, math.nan]})
    assert found is not None
    assert sum(found.counts["all"]) == 1000 and sum(found.counts["chosen"]) == 1
    assert found.edges[-1] < 2 and min(found.counts["all"]) > 0
    assert sum(found.shares("all")) == pytest.approx(100)


def test_equal_and_missing_values_have_histograms_too() -> None:
    assert histogram({"all": [2.0, 2.0]}).edges[0] == 1.5  # type: ignore[union-attr]
    assert histogram({"all": []}) is None
    assert Histogram((0.0, 1.0), {"all": (0,)}).shares("all") == [0.0]


def test_shards_are_summed_and_their_time_is_that_of_the_slowest() -> None:
    manifests = {
        f"shard-{i}": Manifest(stage="score", fingerprint="", files={}, metrics={"num_scored": 5, "seconds": 2.0 + i})
        for i in range(2)
    }
    merged = merge_shards(manifests, 2)
    assert merged.state == "completed" and merged.metrics == {"num_scored": 10, "seconds": 3.0}
    assert merge_shards(manifests, 3).state == "partial"
    assert merge_shards({}, 3).state == "missing"


def test_means_and_deviations_of_shards_are_those_of_all_rows_together() -> None:
    one, other = np.array([1.0, 2.0, 6.0]), np.array([-1.0, 0.0])
    manifests = {
        f"shard-{i}": Manifest(
            stage="score",
            fingerprint="",
            files={},
            metrics={"num_scored": rows.size, "reward_mean": float(rows.mean()), "reward_std": float(rows.std())}
            | {"reward_agreement": (0.5, 0.8)[i], "num_agreement_prompts": (1, 2)[i]},
        )
        for i, rows in enumerate((one, other))
    }
    found = merge_shards(manifests, 2).metrics
    everything = np.concatenate([one, other])
    assert found["reward_mean"] == pytest.approx(everything.mean())
    assert found["reward_std"] == pytest.approx(everything.std())
    assert found["reward_agreement"] == pytest.approx(0.7)


def publish(uri: str, stage_name: str, folder: Path, files: dict[str, Path], **fields: Any) -> None:
    publish_files(uri, files, Manifest(stage=stage_name, fingerprint="f", files={}, **fields))


@pytest.fixture
def stored_run(tmp_path: Path) -> str:
    """A run of one iteration in a folder, without generate and evaluate: two shards, pairs, a curve, training lines."""
    run_uri, scratch = layout.run(str(tmp_path), "r"), tmp_path / "scratch"
    scratch.mkdir()
    inputs = {}
    for shard in range(2):
        uri = layout.shard(run_uri, 1, "score", shard, 2)
        rows = {"prompt_id": ["p"] * 3, "sample_index": [0, 1, 2], "policy_logps": [-1.0, -2.0, -3.0]}
        rows |= {"reference_logps": [-2.0, -2.0, -2.0], "num_chars": [10, 20, 30], "num_tokens": [1, 2, 3]}
        records.write_table(pa.table(rows), records.SCORES, scratch / "part-00000.parquet")
        metrics = {"num_scored": 3, "num_dropped_too_short": 1, "reward_std": 0.8, "seconds": 1.0}
        publish(uri, "score", scratch, {"part-00000.parquet": scratch / "part-00000.parquet"}, metrics=metrics)
        inputs[f"scores/{shard}"] = f"{uri}@abc"
    pair = {"prompt_id": "p", "prompt": "?", "chosen": "a" * 10, "rejected": "b" * 30, "prompt_token_ids": [1]}
    pair |= {"chosen_token_ids": [1], "rejected_token_ids": [2], "chosen_reward": 1.0, "rejected_reward": -1.0}
    pair |= {"chosen_reference_logps": None, "rejected_reference_logps": None, "source": "generated", "split": "train"}
    replayed = {**pair, "source": "replayed", "chosen_reward": None, "rejected_reward": None}
    records.write_table(pa.Table.from_pylist([pair, replayed], records.PAIRS), records.PAIRS, scratch / "pairs.parquet")
    (scratch / "length_penalty.json").write_text('{"length_penalties": [0, 0.1], "length_gaps": [20, -5]}')
    files = {name: scratch / name for name in ("pairs.parquet", "length_penalty.json")}
    uri = layout.stage(run_uri, 1, "pair")
    publish(uri, "pair", scratch, files, inputs=inputs, metrics={"length_penalty": 0.1, "length_gap": -5.0})
    (scratch / "metrics.jsonl").write_text('{"step": 1, "loss": 0.69}\n{"step": 2, "loss": null}\n')
    uri = layout.stage(run_uri, 1, "train")
    publish(uri, "train", scratch, {"metrics.jsonl": scratch / "metrics.jsonl"}, settings={"training": {"beta": 0.1}})
    return run_uri


def test_a_stored_run_is_read_through_its_manifests(stored_run: str) -> None:
    data = read_run(stored_run, 1)
    (one,) = data.iterations
    assert one.stage("score").metrics["num_scored"] == 6 and one.stage("score").state == "completed"
    assert one.rewards is not None and one.lengths is not None
    assert {name: sum(counts) for name, counts in one.rewards.counts.items()} == {"all": 6, "chosen": 1, "rejected": 1}
    assert one.gap_curve == ((0, 20), (0.1, -5))
    assert one.training == ({"step": 1, "loss": 0.69}, {"step": 2, "loss": None})
    assert data.notes == ()
    assert status(one) == "generate not finished"


def test_a_file_that_is_not_what_its_manifest_says_is_a_note_and_no_crash(stored_run: str) -> None:
    place = Path(layout.stage(stored_run, 1, "pair")) / "length_penalty.json"
    place.write_text('{"length_penalties": []}')
    data = read_run(stored_run, 1)
    assert len(data.notes) == 1 and "its manifest says" in data.notes[0]
    assert data.notes[0] in build_report(data)


def test_shards_of_a_stage_that_still_runs_are_found_by_their_names(tmp_path: Path) -> None:
    run_uri = str(tmp_path / "run")
    publish(layout.shard(run_uri, 1, "generate", 1, 3), "generate", tmp_path, {}, metrics={"num_responses": 4})
    (one,) = read_run(run_uri, 1).iterations
    assert one.stage("generate").state == "partial" and one.stage("generate").num_shards == 3
    assert status(one) == "generate not finished"


def test_the_table_of_a_stored_run_needs_its_manifests_only(stored_run: str) -> None:
    for file in Path(stored_run).rglob("*.parquet"):
        file.unlink()
    assert "0.1" in summary_table(summary(read_run(stored_run, 1)))


def test_histograms_are_made_once_and_kept_for_the_pages_of_stages_that_fail(stored_run: str) -> None:
    """A failure costs the run's manifests and small files; it does not take the histograms from the page."""

    def page() -> str:
        return (Path(stored_run) / "report" / "report.html").read_text()

    def charts(text: str) -> list[str]:
        return re.findall("<svg.*?</svg>", text, flags=re.DOTALL)

    update_report(stored_run, details="small")
    assert "Scores are drawn when their iteration has been evaluated" in page()
    assert "DPO loss" in page()
    update_report(stored_run, details="all")
    drawn = page()
    assert "Implicit reward" in drawn
    for file in Path(stored_run).rglob("*.parquet"):
        file.unlink()
    for details in ("small", "all"):
        update_report(stored_run, details=details)
        assert charts(page()) == charts(drawn)
        assert "Could not be read" not in page()


def test_histograms_of_tables_that_were_made_anew_are_not_those_that_were_kept(stored_run: str, tmp_path: Path) -> None:
    update_report(stored_run, details="all")
    publish(layout.shard(stored_run, 1, "score", 0, 2), "score", tmp_path, {})
    update_report(stored_run, details="small")
    assert "Implicit reward" not in (Path(stored_run) / "report" / "report.html").read_text()


def test_kept_histograms_that_cannot_be_read_are_made_again(stored_run: str) -> None:
    update_report(stored_run, details="all")
    (Path(stored_run) / "report" / "histograms.json").write_text("[]")
    update_report(stored_run, details="all")
    assert "Implicit reward" in (Path(stored_run) / "report" / "report.html").read_text()


@pytest.mark.slow
def test_the_page_of_a_failure_among_64_shards_and_three_iterations_takes_seconds(tmp_path: Path) -> None:
    run_uri = layout.run(str(tmp_path), "r")
    for number in (1, 2, 3):
        for shard in range(64):
            for name in ("generate", "score"):
                publish(layout.shard(run_uri, number, name, shard, 64), name, tmp_path, {}, metrics={"num_scored": 1})
    start = time.monotonic()
    update_report(run_uri, details="small")
    assert time.monotonic() - start < 5
    data = read_run(run_uri, 3, details="none")
    assert [one.stage("score").metrics["num_scored"] for one in data.iterations] == [64, 64, 64]


def test_a_run_that_does_not_exist_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    data = read_run(str(tmp_path / "nothing"), 2)
    assert [status(one) for one in data.iterations] == ["not started", "not started"]


@pytest.mark.parametrize(
    ("accepted", "states"), [(0, ["refused", "skipped", "skipped"]), (1, ["not shown", "not started", "not started"])]
)
def test_iterations_that_a_cluster_did_not_start_after_a_refused_policy_are_skipped(
    accepted: int, states: list[str], tmp_path: Path
) -> None:
    """Nothing of them is stored: the pipeline's condition saves even the pods that would say so."""
    run_uri = str(tmp_path / "run")
    publish(layout.shard(run_uri, 1, "generate", 0, 1), "generate", tmp_path, {})
    publish(layout.shard(run_uri, 1, "score", 0, 1), "score", tmp_path, {})
    for name in ("pair", "train"):
        publish(layout.stage(run_uri, 1, name), name, tmp_path, {})
    metrics = {"accepted": accepted, "outcome": "not shown", "reason": "answers grew"}
    publish(layout.stage(run_uri, 1, "evaluate"), "evaluate", tmp_path, {}, metrics=metrics)
    data = read_run(run_uri, 3)
    assert [status(one) for one in data.iterations] == states
    told = f"the policy was refused by {layout.stage(run_uri, 1, 'evaluate')}: answers grew"
    assert summary_table(summary(read_run(run_uri, 3))).count(told) == (0 if accepted else 2)
