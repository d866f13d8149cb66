"""How replies are read: a letter or nothing, a grade from 0 to 5 or nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.judges.wording import (
    comparison_text,
    grade_of_reply,
    grading_text,
    mean_grade,
    preference_of_reply,
    preference_of_tokens,
)


def logs(**probabilities: float) -> dict[str, float]:
    return {token.replace("_", " "): math.log(value) for token, value in probabilities.items()}


@pytest.mark.parametrize(
    ("tokens", "preference"),
    [
        (logs(A=0.6, B=0.2, The=0.1), 0.75),
        (logs(A=0.3, _A=0.3, B=0.1, _B=0.1), 0.75),
        (logs(A=0.9), 1.0),
        (logs(B=0.9, a=0.05), 0.0),
        # Less than half of the probability is on the letters: what is asked is not answered.
        (logs(A=0.3, B=0.1, The=0.5), None),
        (logs(The=0.9), None),
        ({}, None),
        # No probabilities.
        ({"A": 1.0, "B": -1.0}, None),
        ({"A": math.nan, "B": -1.0}, None),
    ],
)
def test_the_probabilities_of_the_letters_are_renormalised(tokens: dict[str, float], preference: float | None) -> None:
    found = preference_of_tokens(tokens, min_label_mass=0.5)
    assert found == (None if preference is None else pytest.approx(preference, abs=1e-9))


def test_no_mass_at_all_is_missing_whatever_the_limit() -> None:
    assert preference_of_tokens(logs(The=0.9), min_label_mass=0) is None
    assert preference_of_tokens(logs(A=0.01, B=0.01), min_label_mass=0) == 0.5


@pytest.mark.parametrize("reply", ["A", " a", "A.", "**A**", "Answer A", "answer: A", "[[A]]", "(A)", "Option A\n"])
def test_a_letter_is_a_verdict(reply: str) -> None:
    assert preference_of_reply(reply) == 1.0
    assert preference_of_reply(reply.replace("A", "B").replace("Bnswer", "Answer").replace(" a", " b")) == 0.0


@pytest.mark.parametrize(
    "reply",
    ["", "C", "AB", "A and B are alike", "A better answer is B", "I cannot choose.", "Tie", "<html>A</html>", "A or B"],
)
def test_anything_else_is_missing(reply: str) -> None:
    assert preference_of_reply(reply) is None


@given(st.text())
def test_no_reply_breaks_the_readers(reply: str) -> None:
    assert preference_of_reply(reply) in (None, 0.0, 1.0)
    grade = grade_of_reply(reply)
    assert grade is None or 0 <= grade <= 5


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("It is right.\nGrade: 4", 4.0),
        ("Grade: **3**", 3.0),
        ("**Grade:** 5/5", 5.0),
        ("grade = 2.5", 2.5),
        ("A grade: 1? No.\nGrade: 0", 0.0),
        ("Grade: 6", None),
        ("Grade: -1", None),
        ("Grade: 45", None),
        ("Grade: 80%", None),
        ("I give it a 4.", None),
        ("Grade: four", None),
        ("", None),
    ],
)
def test_the_last_grade_counts_and_one_out_of_range_is_none(reply: str, grade: float | None) -> None:
    assert grade_of_reply(reply) == grade


def test_a_grade_is_the_mean_of_enough_samples() -> None:
    said = ["Grade: 1", "Grade: 2", "Grade: 6", None, "nothing", "Grade: 3"]
    assert mean_grade([*said], min_grades=3) == 2.0
    assert mean_grade([*said], min_grades=4) is None
    assert mean_grade([], min_grades=1) is None


def test_texts_are_shown_whole_whatever_is_in_them() -> None:
    text = comparison_text("Say {prompt}", "{first}", "{second} {0}")
    assert "Say {prompt}" in text and text.index("{first}") < text.index("[Answer B]") < text.index("{second} {0}")
    assert "{response}" in grading_text("{prompt}", "{response}")
