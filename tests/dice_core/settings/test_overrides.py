"""Assignments on a command line."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.settings.base import ConfigError, Ints, Settings
from dice_core.settings.overrides import merge_overrides, parse_overrides


class Training(Settings):
    """A section."""

    beta: float = 0.1
    loss: str = ""
    note: str = ""
    x: Any = None


class Generation(Settings):
    """Another."""

    stop_token_ids: Ints = ()
    note: str = ""


SECTIONS = {"training": Training, "generation": Generation}


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.bta=1", "training.bta: unknown setting, did you mean 'beta'? allowed: beta, loss, note, x"),
        (
            "generation.beta=1",
            "generation.beta: unknown setting, did you mean 'training.beta'? allowed: stop_token_ids",
        ),
        (
            "pods.note=1",
            "pods.note: unknown section 'pods', did you mean 'training.note' or 'generation.note'? allowed:",
        ),
        ("pods.cpu=1", "pods.cpu: unknown section 'pods', did you mean 'cluster.trainer_cpu'? allowed: training, gen"),
        ("training.cpu=1", "training.cpu: unknown setting, did you mean 'cluster.trainer_cpu'? allowed: beta, loss"),
        ("trainin.note=1", "trainin.note: unknown section 'trainin', did you mean 'training'? allowed: training, gen"),
        ("pods.nothing=1", "pods.nothing: unknown section 'pods', allowed: training, generation"),
    ],
)
def test_an_unknown_setting_names_what_may_be_meant_in_other_sections_too(text, message):
    with pytest.raises(ConfigError) as error:
        parse_overrides([text], SECTIONS, {"cpu": "cluster.trainer_cpu"})
    assert str(error.value).startswith(message)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_json_value_comes_through(value):
    assert parse_overrides([f"training.x={json.dumps(value)}"], SECTIONS) == {"training": {"x": value}}


def test_an_override_wins_field_by_field():
    assert merge_overrides({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}) == {
        "a": {"x": 1, "y": 3},
        "b": {"z": 4},
    }
