"""What prepare-data takes from the model: the control tokens and the date of its chat format."""

import json
from pathlib import Path

import pytest

from dice_core.settings.base import ConfigError
from dice_core.stages.import_model import import_model
from dice_core.stages.prepare_data import prepare_data

pytestmark = pytest.mark.slow

ROWS = Path(__file__).parents[2] / "data" / "rows"


@pytest.fixture
def policy(model_copy: Path, tmp_path: Path) -> str:
    """Return a model whose template tells it the date."""
    template = model_copy / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    return import_model(str(model_copy), str(tmp_path / "policy")).uri


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_templated_text_is_counted_the_date_is_said_and_a_benchmark_is_looked_for_whole(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(6)]
    pairs[0]["chosen"] += "<|im_end|>"
    asked = {"instruction": "Question", "input": "1?"}
    benchmark = [{"prompt": "Question 1?", "system": "Be brief."}, {**asked, "history": "Hi."}]
    report = prepare_data(
        write(tmp_path / "pairs.jsonl", *pairs),
        str(tmp_path / "out"),
        policy_uri=policy,
        exclude_source=write(tmp_path / "benchmark.jsonl", *benchmark),
        data={"num_held_out": 1},
    )
    counts = {name: value for name, value in report.metrics.items() if name != "seconds"}
    assert counts == {
        "num_prompts": 3,
        "num_preferences": 3,
        "num_held_out": 1,
        "num_dropped_preferences_control_tokens": 1,
        "num_dropped_preferences_in_benchmark": 1,
        "num_dropped_exclude_history": 1,
    }
    said = "prepare-data: the chat template tells the model the date, in all stages 2024-07-26 (chat.date)"
    assert said in capsys.readouterr().err


def test_pairs_of_one_prompt_and_rows_with_a_system_prompt_are_refused_in_one_line(policy: str, tmp_path: Path) -> None:
    for file, message in (
        ("one-prompt.jsonl", "all 6 usable pairs have one prompt, and held-out pairs are whole prompts"),
        ("pairs.jsonl", "no preference pair is left, dropped: 6 system_prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_data(str(ROWS / "alpaca-input" / file), str(tmp_path / "out"), policy_uri=policy)
    with pytest.raises(ConfigError, match=r"^chat\.date: must be a date such as 2024-07-26"):
        prepare_data("p.jsonl", str(tmp_path / "out"), policy_uri=policy, chat={"date": "today"})
