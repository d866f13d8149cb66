"""AlpacaEval's files: prompts, outputs, leaderboard and annotations, with numbers worked by hand."""

import json
import math

import pytest

from dice_core.data.records import RecordError
from dice_core.evaluation.alpaca import (
    AlpacaPrompt,
    Annotation,
    model_outputs,
    read_annotations,
    read_leaderboard,
    read_prompts,
    score,
)
from dice_core.evaluation.published import PUBLISHED


def write(path, values):
    path.write_text(json.dumps(values))
    return path


def annotation(number, preference, output, baseline):
    return {
        "instruction": f"Question {number}?",
        "output_1": baseline,
        "output_2": output,
        "generator_1": "gpt4_1106_preview",
        "generator_2": "mine",
        "annotator": "weighted",
        "preference": preference,
    }


def test_prompts_come_with_what_their_file_says_of_a_baseline(tmp_path):
    rows = [{"instruction": "Why?", "dataset": "koala"}, {"instruction": "How?", "output": "So.", "generator": "gpt"}]
    assert read_prompts(write(tmp_path / "p.json", rows), "p.json") == [
        AlpacaPrompt("Why?", "koala"),
        AlpacaPrompt("How?", "", "So.", "gpt"),
    ]


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({}, "must be a JSON list of objects"),
        ([], "must be a JSON list of objects"),
        (["Why?"], "must be a JSON list of objects"),
        ([{"instruction": "Why?"}, {"prompt": "How?"}], "object 1 has no instruction"),
        ([{"instruction": "Why?", "input": "x"}], "object 0 has an input"),
    ],
)
def test_another_file_is_one_line(values, fault, tmp_path):
    with pytest.raises(RecordError, match=rf"^p\.json: {fault}") as error:
        read_prompts(write(tmp_path / "p.json", values), "p.json")
    assert "\n" not in str(error.value)


def test_outputs_keep_the_order_of_the_prompts_and_one_answer_for_a_prompt_that_is_there_twice():
    prompts = [AlpacaPrompt("b?", "koala"), AlpacaPrompt("a?"), AlpacaPrompt("b?")]
    assert model_outputs(prompts, {"a?": "A", "b?": "B"}, "mine") == [
        {"instruction": "b?", "output": "B", "generator": "mine", "dataset": "koala"},
        {"instruction": "a?", "output": "A", "generator": "mine"},
        {"instruction": "b?", "output": "B", "generator": "mine"},
    ]


def test_the_leaderboard_is_read_by_the_name_of_the_model(tmp_path):
    path = tmp_path / "leaderboard.csv"
    path.write_text(",win_rate,mode,lc_standard_error\nother,1.0,community,\nmine,43.5,community,0.25\n")
    assert read_leaderboard(path, "mine", "l.csv") == {"win_rate": 43.5, "lc_standard_error": 0.25}
    with pytest.raises(RecordError, match=r"l\.csv: has no row of 'yours', but of 'other', 'mine'"):
        read_leaderboard(path, "yours", "l.csv")


def test_a_preference_runs_from_the_baseline_to_the_model_and_a_tie_is_written_in_two_ways(tmp_path):
    """1 is the baseline's, 2 the model's; 0 and 1.5 are ties; null is missing."""
    rows = [annotation(i, preference, "a", "b") for i, preference in enumerate([1, 2, 1.75, 0, 1.5, None])]
    found = read_annotations(write(tmp_path / "a.json", rows), "a.json")
    assert [one.preference for one in found] == [0, 1, 0.75, 0.5, 0.5, None]
    for wrong in (3, "x", 0.5):
        with pytest.raises(RecordError, match=r"a\.json: not the annotations of AlpacaEval"):
            read_annotations(write(tmp_path / "a.json", [annotation(0, wrong, "a", "b")]), "a.json")


def verdicts(*preferences):
    return [
        Annotation(f"Q{i}?", preference, f"A{i}", "baseline", "gpt4", "weighted")
        for i, preference in enumerate(preferences)
    ]


def outputs(number):
    return [{"instruction": f"Q{i}?", "output": f"A{i}", "generator": "mine"} for i in range(number)]


def test_scores_are_those_of_the_leaderboard_and_ours_beside_them():
    """Answers of one length each: the length explains nothing, and ours is the plain mean of 1, 0, 0.5."""
    board = {"win_rate": 50.0, "standard_error": 28.9, "length_controlled_winrate": 47.5, "lc_standard_error": 1.5}
    found = score(board, verdicts(1, 0, 0.5, None), outputs(4), "r")
    assert (found["win_rate_percent"], found["win_rate_percent_se"]) == (50.0, 28.9)
    assert (found["length_controlled_win_rate_percent"], found["length_controlled_win_rate_percent_se"]) == (47.5, 1.5)
    assert math.isclose(found["length_controlled_win_rate_percent_by_length"], 50, abs_tol=1e-6)
    assert (found["num_annotated"], found["num_missing"]) == (3, 1)
    assert (found["mean_characters"], found["mean_characters_baseline"]) == (2, 8)
    assert (found["annotator"], found["baseline"]) == ("weighted", "gpt4")


def test_files_that_are_not_of_one_evaluation_are_refused():
    with pytest.raises(RecordError, match=r"r: the leaderboard says 51\.00 %, its annotations give 50\.00 %"):
        score({"win_rate": 51.0}, verdicts(1, 0), outputs(2), "r")
    with pytest.raises(RecordError, match="the annotations are of other outputs"):
        score({"win_rate": 50.0}, verdicts(1, 0), outputs(3), "r")
    with pytest.raises(RecordError, match="no annotation has a preference"):
        score({"win_rate": 50.0}, verdicts(None), outputs(1), "r")


def test_the_papers_table_has_two_iterations_for_each_preset_of_the_paper():
    assert {name: len(rows) for name, rows in PUBLISHED.items()} == {"zephyr": 3, "llama3": 3}
    assert PUBLISHED["zephyr"][2] == (20.71, 20.16) and PUBLISHED["llama3"][2].win_rate == 30.99
