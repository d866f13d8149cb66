"""Assignments on a command line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.settings.base import ConfigError
from dice_core.settings.overrides import merge_overrides, parse_overrides

SECTIONS = ["training", "generation"]


def test_values_are_json_where_they_can_be_and_words_otherwise():
    parsed = parse_overrides(
        ["training.beta=0.2", "training.loss=ipo", "generation.stop_token_ids=[1, 2]", "training.note=a=b"], SECTIONS
    )
    assert parsed == {
        "training": {"beta": 0.2, "loss": "ipo", "note": "a=b"},
        "generation": {"stop_token_ids": [1, 2]},
    }


@pytest.mark.parametrize("text", ["training", "training.beta", "beta=1", ".beta=1", "training.=1", "=1"])
def test_what_is_no_assignment_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"must be SECTION.FIELD=VALUE, such as"):
        parse_overrides([text], SECTIONS)


def test_an_unknown_section_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'training'"):
        parse_overrides(["trainin.beta=1"], SECTIONS)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_json_value_comes_through(value):
    assert parse_overrides([f"training.x={json.dumps(value)}"], SECTIONS) == {"training": {"x": value}}


def test_an_override_wins_field_by_field():
    assert merge_overrides({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}) == {
        "a": {"x": 1, "y": 3},
        "b": {"z": 4},
    }
