"""The benchmarks: the smallest size of scoring and pairing runs, both ways agree, and ratios are what they say."""

import json
from pathlib import Path

import pytest

from pipelines.planning.ranges import Range
from tests.benchmarks import __main__ as main_module
from tests.benchmarks import gpu, pair, plan, results, score, storage
from tests.benchmarks.measure import BenchmarkError, Comparison, Outcome, Timed, compare, run_way
from tests.benchmarks.work import SIZES, Work, prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return prepare(SIZES["smoke"], finish=lambda work: None, root=tmp_path_factory.mktemp("benchmarks"))


def outcome(timed: Timed) -> Outcome:
    return Outcome(timed.seconds, timed.seconds, peak_bytes=1, values=timed.values)


def test_both_ways_of_scoring_agree(work: Work) -> None:
    ours = score.ours_forward(work.folder)
    assert len(ours.values["scores"]) == 8
    assert len(set(ours.values["scores"])) == 8
    for other in (score.upstream_forward(work.folder), score.ours_stage(work.folder)):
        assert score.same_scores([ours.values], [other.values]) == ""


def test_a_score_that_differs_is_found(work: Work) -> None:
    theirs = {"scores": [1.0, 2.0], "logps": [-3.0]}
    assert score.same_scores([{**theirs, "scores": [1.0, 2.002]}], [theirs]) == "scores differ by up to 0.002 nats"
    assert score.same_scores([{**theirs, "scores": [1.0]}], [theirs]) == "1 scores against 2"
    assert score.same_scores([{**theirs, "logps": [float("nan")]}], [theirs]) == "logps differ by up to nan nats"


def test_both_ways_of_pairing_agree(work: Work) -> None:
    upstream = outcome(pair.upstream(work.folder))
    outcomes = {"pair:upstream": [upstream]}
    ways = [pair.ours, pair.ours_with_texts, pair.ours_stage, pair.ours_penalty, pair.upstream_penalty]
    ways += [pair.ours_stage_exact, pair.ours_stage_mu_2sigma, pair.ours_stage_margin]
    outcomes |= {f"pair:{way.__name__}": [outcome(way(work.folder))] for way in ways}
    for comparison in pair.COMPARISONS:
        assert compare(comparison, outcomes).difference == ""
    assert len(upstream.values["pairs"]) == 30


def test_a_plan_is_compared_with_the_stages_that_a_demo_tells() -> None:
    assert plan.stage_told("[ 2/14] import policy:               33 s\n") == ("import policy", 33)
    line = "[ 6/14] iteration 1: generate and score 1 of 1: 56 s; 22 prompts, 88 responses\n"
    assert plan.stage_told(line) == ("iteration 1: generate and score", 56)
    assert plan.stage_told("        train: step 1 of 8: loss 0.6931\n") is None
    found = plan.compared("one", Range(10, 30), 3 * 2**30, plan.Real(25, 20, 2 * 2**30))
    assert (found["middle over real"], found["memory over real"]) == (0.8, 1.5)
    assert plan.compared("one", Range(1, 1), 0.0, plan.Real(0, 0, 1))["memory over real"] is None


def test_both_ways_of_storage_move_the_same_files(work: Work) -> None:
    ways = (storage.ours_upload, storage.ours_download, storage.boto3_upload, storage.boto3_download)
    outcomes = {f"storage:{way.__name__}": [outcome(way(work.folder))] for way in ways}
    assert [compare(comparison, outcomes).difference for comparison in storage.COMPARISONS] == ["", ""]
    assert storage.same_files([{"digests": {"a": "1"}}], [{"digests": {"a": "2"}}]) == "other files"


def test_a_way_runs_in_a_process_of_its_own(work: Work) -> None:
    found = run_way("pair:ours", work.folder, 30)
    assert 0 < found.seconds < found.process_seconds
    assert found.peak_bytes > 10_000_000
    assert pair.same_pairs([found.values], [pair.ours(work.folder, "30").values]) == ""


def test_both_ways_of_the_accelerator_agree_on_a_small_model(device: str) -> None:
    shape = {name: 64 for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = gpu.random_model(shape, device, "float32")
    gpu.check(model, [gpu.PromptGroup([1, 2, 3], [[4, 5], [6, 7, 8]]), gpu.PromptGroup([9], [[1, 2, 3], [4]])])


def test_a_run_writes_a_table_plain_numbers_and_curves(
    work: Work, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ways = [c for c in pair.COMPARISONS if c.ours == ("pair:ours",)]
    arguments = ["--stage", "pair", "--size", "smoke", "--repeats", "1", "--out", str(tmp_path)]
    assert main_module.main(arguments, comparisons={"pair": ways}, make_work=lambda _: work) == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert page == capfd.readouterr().out.removesuffix("\n")
    assert "| pair | upstream's pandas sweep over the grid |" in page
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert [row["stage"] for row in numbers["rows"]] == ["pair"]
    assert [point["amount"] for point in numbers["curves"][0]["ours"]] == [30, 60]
    assert "<svg" in (tmp_path / "pairing-seconds.svg").read_text()
    before = results.measured_before(tmp_path)
    assert before is not None and results.markdown(before) == page


def test_a_stage_measured_again_replaces_its_own_rows_and_keeps_the_others() -> None:
    def found(*stages: str, command: str, machine: str = "here") -> results.Results:
        outcomes = {way: [Outcome(1.0, 1.0, 10, {})] for way in ("x:a", "x:b")}
        rows = [compare(Comparison(s, command, ("x:a",), ("x:b",), "part", lambda *_: ""), outcomes) for s in stages]
        return results.Results(command, {"processor": machine, "load before": command}, {"n": 1}, 3, [], rows)

    both = results.with_others_of(found("score", "pair", command="all"), found("pair", command="again"))
    assert [(row.stage, row.against) for row in both.rows] == [("score", "all"), ("pair", "again")]
    assert both.command == "all; then again"
    with pytest.raises(BenchmarkError, match="results of another machine"):
        results.with_others_of(found("score", command="all", machine="there"), found("pair", command="again"))


def test_a_row_is_the_median_ratio_and_the_ratio_of_peaks() -> None:
    """Ours takes 1, 1, 2 s and the peer 4, 6, 4: ratios 4, 6, 2. Two ways add up and their larger peak counts."""
    outcomes = {
        "a:ours": [Outcome(seconds, seconds + 1, 10, {}) for seconds in (0.5, 0.5, 1)],
        "b:ours": [Outcome(seconds, seconds + 1, 20, {}, held_bytes=18) for seconds in (0.5, 0.5, 1)],
        "a:peer": [Outcome(seconds, seconds + 1, 80, {}, held_bytes=40) for seconds in (4, 6, 4)],
    }
    comparison = Comparison("score", "x", ("a:ours", "b:ours"), ("a:peer",), "part", lambda *_: "", 3.5, 0.3)
    row = compare(comparison, outcomes)
    assert (row.ratios, row.ratio, row.memory, row.is_reached) == ([4, 6, 2], 4, 0.25, True)
    line = "| score | x | 4.00 (2.00..6.00) | 0.25 (0.05 of what the work added) | >= 3.5x, <= 0.3x memory | yes |"
    assert results.table([row]).splitlines()[2] == line
