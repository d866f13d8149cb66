"""The page of a run: well-formed, self-contained, small, complete, and safe with any text."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from dice_core.report.page import build_report, clean, expected_first_loss, typeset
from dice_core.report.run_data import IterationData, RunData, histogram
from dice_core.storage.failures import StageFailure
from tests.synthetic_run import ROOT, evaluation, iteration, run_data, training_lines, warm_start

VOID = {"meta", "path", "circle", "br", "link", "img"}


class Balance(HTMLParser):
    """Checks that every element is closed in order, and keeps text, tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return build_report(run_data(warm_start(), iteration(1), iteration(2, accepted=False)))


def test_the_page_is_well_formed(page: str) -> None:
    parsed = Balance(page)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.startswith("<!DOCTYPE html>")


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    parsed = Balance(page)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "use", "a"}
    assert not {name for name, _ in parsed.attributes} & {"src", "href", "srcset", "action", "background"}
    assert not re.search(r"https?://|url\(|@import|localStorage|cookie", page)
    assert any("default-src 'none'" in (value or "") for name, value in parsed.attributes if name == "content")


def test_every_number_of_the_table_is_on_the_page(page: str) -> None:
    text = " ".join(Balance(page).text.split())
    for row in ("16,384", "112 (0.7%)", "1,009 + 1,009", "0.0231", "0.00231", "+1031.4 \u2192 \u22120.8"):
        assert row in text
    for row in (
        "0.6931 \u2192 0.5124",
        "50.0% \u2192 87.1%",
        "59.4% \u00b1 3.1%",
        "66.4% \u00b1 2.9%",
        "+7.0 \u00b1 2.1",
        "+2.90 \u2192 +4.21",
        "58.2% \u00b1 3.1%",
    ):
        assert row in text
    for row in (
        "1,201 \u00b1 91",
        "1,284 \u00b1 88",
        "+6.9% \u00b1 3.1%",
        "29 min 02 s",
        "1 h 25 min",
        "+4.8e\u221206",
    ):
        assert row in text


def test_a_refused_policy_is_the_first_thing_said(page: str) -> None:
    text = " ".join(Balance(page).text.split())
    assert text.index("Iteration 2 refused: answers grew by 82.0%") < text.index("Overview")


def test_a_policy_without_a_gain_is_said_so_before_the_numbers() -> None:
    text = " ".join(Balance(build_report(run_data(iteration(1, improved=False)))).text.split())
    verdict = "Iteration 1 no gain: accuracy 87.5% \u2192 81.2% (\u22126.2 \u00b1 5.1 points)"
    assert text.index(verdict) < text.index("Overview")


def test_what_pairing_left_out_is_on_the_page(page: str) -> None:
    for label, count in (
        ("scores left out: not a finite number", "2"),
        ("prompts left out: too few scored responses", "11"),
        ("prompts left out: best and worst are one response", "3"),
        ("generated pairs that the replay ratio has no room for", "4,812"),
    ):
        assert f"{label}</th><td>&ndash;</td><td>{count}</td><td>{count}</td>" in page


def test_why_a_stage_failed_is_said_before_all_else_and_an_iteration_that_failed_is_not_called_not_started() -> None:
    failed = StageFailure(
        stage="train",
        reason="training failed: the disk is full",
        is_final=True,
        time="2026-11-29T00:01:31Z",
        pod="dice-demo-4r7mm-318",
        node="dice-demo-4r7mm(0).root(0).train(0).executor(1)",
        place="iteration-2/train",
    )
    second = IterationData(2, {}, failures=(failed,))
    text = " ".join(Balance(build_report(run_data(iteration(1), second))).text.split())
    said = (
        "Iteration 2: train failed: training failed: the disk is full attempt 2, pod dice-demo-4r7mm-318, "
        "2026-11-29 00:01:31 UTC, another attempt would meet it too"
    )
    assert text.index(said) < text.index("Iteration 1 accepted") < text.index("acceptedtrain failed")
    assert "not started" not in text


def test_text_of_people_and_models_is_shown_and_never_obeyed() -> None:
    attack = '</div><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)>&amp; \x00\u202e'
    one = iteration(1)
    one = IterationData(1, one.stages, evaluation=evaluation(True, [(attack, attack, attack)]))
    data = RunData(f"s3://bucket/runs/{attack}", (one,), notes=(attack,))
    parsed = Balance(build_report(data))
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert parsed.text.count("<script>alert(1)</script>") >= 5
    assert "\x00" not in parsed.text


def test_control_characters_and_half_surrogates_are_replaced() -> None:
    assert clean("a\x00b\ud800c\td\r\ne\x1bf") == "a\ufffdb\ufffdc\td\ne\ufffdf"


def test_sixteen_histograms_of_ten_thousand_scores_and_long_answers_stay_under_a_megabyte() -> None:
    rng = np.random.default_rng(0)
    samples = [("<" * 20_000, "&" * 20_000, "\u4e16" * 20_000)] * 40
    runs = []
    for number in range(1, 17):
        scores = histogram({name: rng.standard_cauchy(10_000) for name in ("all", "chosen", "rejected")})
        stages, training = iteration(number, num_scores=64).stages, training_lines(2000, 0.4, rng)
        curve = tuple((float(i), float(-i)) for i in range(1000))
        runs.append(IterationData(number, stages, scores, scores, curve, training, evaluation(True, samples)))
    size = len(build_report(run_data(*runs)).encode())
    assert 100_000 < size < 1_000_000


def test_one_iteration_without_a_warm_start_makes_a_page() -> None:
    text = Balance(build_report(run_data(iteration(1)))).text
    assert "iteration 1" in text and "warm start" not in text


def test_a_run_that_has_not_begun_makes_a_page_that_says_so() -> None:
    data = RunData(ROOT, (IterationData(1), IterationData(2)))
    text = Balance(build_report(data)).text
    for words in (
        "Nothing was generated yet",
        "No scores yet",
        "No training has ended yet",
        "No policy was evaluated yet",
    ):
        assert words in text
    assert text.count("not started") == 4  # in the verdicts and in the table


def test_the_loss_expected_at_step_0() -> None:
    assert expected_first_loss({"loss": "sigmoid", "beta": 0.1}) == pytest.approx(0.693147, abs=1e-6)
    assert expected_first_loss({"loss": "ipo", "beta": 0.5}) == 1.0
    assert expected_first_loss({"loss": "hinge"}) == 1.0
    assert expected_first_loss({"loss": "sigmoid", "sft_weight": 0.1}) is None


def test_tables_are_typeset() -> None:
    assert typeset("+1.5 -> -0.2 +/- 3") == "+1.5 \u2192 \u22120.2 \u00b1 3"
    assert typeset("iteration-1 of a-b, 3-4") == "iteration-1 of a-b, 3-4"
    assert typeset("-") == "\u2013"
