"""Holds the demo's data to what pipelines/data/README.md says of it."""

import re
from pathlib import Path
from statistics import mean

import pytest

from dice_core.data.decontamination import normalised_text
from dice_core.data.preparing import prepare
from dice_core.data.settings import DataConfig
from dice_core.data.sources import read_preferences

FILE = Path(__file__).parents[3] / "pipelines" / "data" / "demo_preferences.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return read_preferences(str(FILE)).table.to_pylist()


def test_there_are_as_many_pairs_as_the_readme_says(rows):
    assert len(rows) == 88
    assert f"{len(rows)} everyday questions" in (FILE.parent / "README.md").read_text()


def test_nothing_in_it_is_dropped():
    prepared = prepare(
        None,
        read_preferences(str(FILE)),
        DataConfig(num_held_out=16),
        seed=0,
        num_prompt_tokens=lambda texts: [1] * len(texts),
        max_prompt_tokens=1,
    )
    assert prepared.counts == {"num_prompts": 72, "num_preferences": 72, "num_held_out": 16}


def test_no_text_is_there_twice(rows):
    for name in ("prompt", "chosen", "rejected"):
        assert len({normalised_text(row[name]) for row in rows}) == len(rows), name
    # No template: prompts begin in many ways.
    assert len({tuple(row["prompt"].split()[:2]) for row in rows}) > len(rows) / 2


def test_length_does_not_tell_the_good_answer_from_the_bad_one(rows):
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    assert abs(mean(gaps)) < 3
    assert 0.3 < mean(gap > 0 for gap in gaps) < 0.7


def test_texts_are_clean(rows):
    for row in rows:
        for text in row.values():
            assert text == text.strip()
            assert not re.search(r"[^\n ] {2,}|\t|\r| \n", text)


def test_answers_fit_the_tokens_that_the_demo_generates(rows, smollm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    longest = {
        name: max(len(tokenizer(row[name]).input_ids) for row in rows) for name in ("prompt", "chosen", "rejected")
    }
    assert longest["prompt"] <= 64
    assert longest["chosen"] <= 64
    assert longest["rejected"] <= 64
