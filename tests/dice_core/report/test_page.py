"""The page of a run: well-formed, self-contained, small, true to summary.json, and safe with any text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from dice_core.report.page import build_report, clean, typeset
from dice_core.report.run_data import IterationData, RunData, histogram
from dice_core.report.summary import summary
from dice_core.storage.failures import StageFailure
from tests.synthetic_run import ROOT, evaluation, iteration, policy_of, run_data, sample, training_lines, warm_start

VOID = {"meta", "path", "circle", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps text, tags, attributes, and the cells of tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.numbers: list[tuple[str, str, str]] = []
        """Name in the summary, value and text of each `data` element."""
        self.bare = ""
        """Text of the cells of tables of numbers, without that of `data` elements."""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        given = dict(attrs)
        if tag == "data":
            self.numbers.append((str(given["title"]), str(given["value"]), ""))
        if tag not in VOID:
            self.open.append(f"{tag}.{given.get('class') or ''}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop().split(".")[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data
        if "data." in self.open:
            name, value, text = self.numbers.pop()
            self.numbers.append((name, value, text + data))
        elif any(tag.startswith("td.") for tag in self.open) and any("numbers" in tag for tag in self.open):
            self.bare += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def at(values: Any, path: str) -> Any:
    """Return what stands at a path such as iterations[1].seconds.train."""
    for part in re.findall(r"[^.\[\]]+", path):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


@pytest.fixture(scope="module")
def run() -> RunData:
    return run_data(warm_start(), iteration(1), iteration(2, "not shown", against=policy_of(1)), promoted=1)


@pytest.fixture(scope="module")
def page(run: RunData) -> str:
    return build_report(run)


def test_the_page_is_well_formed(page: str) -> None:
    parsed = Page(page)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.startswith("<!DOCTYPE html>")


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    parsed = Page(page)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "use"}
    assert not {name for name, _ in parsed.attributes} & {"src", "srcset", "action", "background"}
    assert not re.search(r"https?://|url\(|@import|localStorage|cookie", page)
    assert any("default-src 'none'" in (value or "") for name, value in parsed.attributes if name == "content")


def test_every_number_of_the_page_stands_in_the_summary_under_the_name_that_it_gives(run: RunData, page: str) -> None:
    parsed, values = Page(page), json.loads(json.dumps(summary(run), allow_nan=False))
    assert len(parsed.numbers) > 150
    for name, value, text in parsed.numbers:
        found = at(values, name)
        assert value == (found if isinstance(found, str) else json.dumps(found)), name
        # What a person reads is that number, rounded: its digits, or those in percent, GiB or time.
        assert text == value or re.search(r"\d", text), name


def test_no_cell_of_a_table_has_a_number_of_another_origin(page: str) -> None:
    bare = Page(page).bare
    assert not re.search(r"\d", bare.replace("95%", "")), bare


def test_the_link_to_the_summary_holds_the_summary(run: RunData, page: str) -> None:
    from base64 import b64decode

    links = [value or "" for name, value in Page(page).attributes if name == "href"]
    assert len(links) == 1 and links[0].startswith("data:application/json;base64,")
    assert json.loads(b64decode(links[0].partition(",")[2])) == summary(run)


def test_the_verdict_is_the_first_thing_said(page: str) -> None:
    text = Page(page).words
    said = (
        "Better: iteration 1 against the first policy wins 54.3% of 1,024 prompts (95% interval 51.3% to 57.3%), "
        "53.1% at equal length"
    )
    assert text.index(said) < text.index("time of all stages") < text.index("Better or not") < text.index("Overview")


def test_every_number_of_the_overview_is_read_as_it_should_be(page: str) -> None:
    text = Page(page).words
    for row in (
        "implicit-reward accuracy on 256 held-out pairs",
        "66.4% (60.6% to 72.2%)",
        "+7.0 (+2.9 to +11.1)",
        "DPO loss on 512 training pairs, before \u2192 after",
        "0.6931 \u2192 0.5124",
        "+1031.4 \u2192 \u22120.8",
        "0.00231",
        "541, 31, 452",
        "1 h 25 min",
        "61.0 GiB",
        "41.2%",
        "1,009 + 1,009",
    ):
        assert row in text


def test_a_gain_within_its_interval_has_no_colour(page: str) -> None:
    rows = re.findall(r'<div class="row (\w+) is-gain"><span class="who">(iteration \d)', page)
    assert {name for side, name in rows if side == "above"} == {"iteration 1"}
    assert ("unclear", "iteration 2") in rows
    assert '<span class="state not shown">not shown</span>' in page.replace('<data value="not shown" title="', "") or (
        'class="state not shown"' in page
    )
    assert "state better" not in build_report(run_data(iteration(1, "not shown")))


def test_the_gates_rules_are_told_with_bound_and_state(page: str) -> None:
    text = Page(page).words
    assert "win rate is 0.512, the bound is 0.5" in text
    assert "guards: a broken one refuses the policy" in text
    refused = Page(build_report(run_data(iteration(1, accepted=False)))).words
    assert "broken+82.0% (+75.9% to +88.1%)" in refused


def test_filters_that_took_nothing_are_one_line(page: str) -> None:
    parsed = Page(page)
    assert "Nothing was left out for: empty; pairs left out: both responses the same." in parsed.words
    for label in (
        "prompts left out: too few scored responses",
        "generated pairs that the replay ratio has no room for",
        "dropped: ended by the token limit",
    ):
        assert label in parsed.text


def test_wins_and_losses_are_told_by_length_and_by_category(page: str) -> None:
    text = Page(page).words
    assert "Iteration 2, by category" in text and "advice101" in text.replace(" ", "")
    assert "longer by more than 25%" in text


def test_a_prompt_is_followed_through_all_policies_and_disputes_are_shown(page: str) -> None:
    text = Page(page).words
    followed = text[text.index("Answers side by side") :]
    first = followed[followed.index("My landlord") : followed.index("Write a two-line")]
    assert first.index("first policy") < first.index("iteration 1") < first.index("iteration 2")
    disputed = text[text.index("Most disputed answers") : text.index("Answers side by side")]
    # Reward and judge disagree on the basil, the judge with itself on the hiker, and nobody on the landlord.
    assert disputed.index("basil") < disputed.index("birthday") and "landlord" not in disputed
    assert "implicit reward +4.00 nats" in disputed and "shown first 80%, shown second 30%" in disputed


def test_why_a_stage_failed_is_said_and_an_iteration_that_failed_is_not_called_not_started() -> None:
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
    text = Page(build_report(run_data(iteration(1), second))).words
    said = (
        "Iteration 2: train failed: training failed: the disk is full attempt 2, pod dice-demo-4r7mm-318, "
        "2026-11-29 00:01:31 UTC, another attempt would meet it too"
    )
    assert text.index(said) < text.index("Iteration 1 better") < text.index("bettertrain failed")
    assert "not started" not in text


def test_text_of_people_and_models_is_shown_and_never_obeyed() -> None:
    attack = '</div><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)>&amp; \x00\u202e'
    one = iteration(1)
    one = IterationData(1, one.stages, evaluation=evaluation("better", [sample(attack, attack, attack)]))
    data = RunData(f"s3://bucket/runs/{attack}", (one,), notes=(attack,))
    parsed = Page(build_report(data))
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert parsed.text.count("<script>alert(1)</script>") >= 5
    assert "\x00" not in parsed.text


def test_control_characters_and_half_surrogates_are_replaced() -> None:
    assert clean("a\x00b\ud800c\td\r\ne\x1bf") == "a\ufffdb\ufffdc\td\ne\ufffdf"


def test_sixteen_histograms_of_ten_thousand_scores_and_long_answers_stay_under_a_megabyte() -> None:
    rng = np.random.default_rng(0)
    samples = [sample(f"{i}" + "<" * 20_000, "&" * 20_000, "\u4e16" * 20_000) for i in range(40)]
    runs = []
    for number in range(1, 17):
        scores = histogram({name: rng.standard_cauchy(10_000) for name in ("all", "chosen", "rejected")})
        stages, training = iteration(number, num_scores=64).stages, training_lines(2000, 0.4, rng)
        curve = tuple((float(i), float(-i)) for i in range(1000))
        found = evaluation("better", samples, number=number)
        runs.append(IterationData(number, stages, scores, scores, curve, training, found))
    size = len(build_report(run_data(*runs)).encode())
    assert 100_000 < size < 1_000_000


def test_one_iteration_without_a_warm_start_makes_a_page() -> None:
    text = Page(build_report(run_data(iteration(1)))).text
    assert "iteration 1" in text and "warm start" not in text


def test_a_run_that_has_not_begun_makes_a_page_that_says_so() -> None:
    data = RunData(ROOT, (IterationData(1), IterationData(2)))
    text = Page(build_report(data)).text
    for words in (
        "No verdict yet: nothing was measured.",
        "Nothing was generated yet",
        "No scores yet",
        "No training has ended yet",
        "No policy was evaluated yet",
    ):
        assert words in text
    assert text.count("not started") == 4  # in the verdicts and in the table


def test_what_the_run_works_on_and_what_it_took_stand_in_the_header(page: str) -> None:
    text = Page(page).words
    header = text[text.index("DICE run") : text.index("Iteration 1")]
    for words in (
        "zephyr",
        "HuggingFaceH4/zephyr-7b-beta",
        "HuggingFaceH4/ultrafeedback_binarized",
        "4 h 19 min",
        "30.54",
    ):
        assert words in header
    assert "cost" not in header
    paid = build_report(run := run_data(iteration(1)), summary(run, gpu_hour_price=2.5))
    assert "38.17 at 2.50 a GPU hour" in Page(paid).words


def test_what_ran_a_stage_stands_beside_its_place(page: str) -> None:
    assert "ran byrunner: pytorchjob, num_nodes: 2" in Page(page).text


def test_pages_of_trackers_are_linked_and_nothing_else_is() -> None:
    one = iteration(1)
    one.stages["train"].metrics["mlflow_url"] = "https://mlflow.example/#/experiments/1/runs/2"
    one.stages["pair"].metrics["other_url"] = "javascript:alert(1)"
    parsed = Page(build_report(run_data(one)))
    links = [value or "" for name, value in parsed.attributes if name == "href"]
    assert [link for link in links if not link.startswith("data:")] == ["https://mlflow.example/#/experiments/1/runs/2"]


def test_results_on_alpaca_eval_stand_beside_the_papers() -> None:
    first, second = iteration(1), iteration(2)
    scores = {"win_rate_percent": 17.1, "win_rate_percent_se": 1.2, "length_controlled_win_rate_percent": 18.3}
    second = replace(second, alpaca_eval={**scores, "annotator": "weighted_alpaca_eval_gpt4_turbo", "seconds": 9.0})
    page = build_report(run := run_data(first, second))
    rows = summary(run)["alpaca_eval"]
    assert [row["name"] for row in rows] == ["first policy", "iteration 1", "iteration 2"]
    assert [row["paper_length_controlled_win_rate_percent"] for row in rows] == [12.69, 19.03, 20.71]
    text = Page(page).words
    table = text[text.index("AlpacaEval 2") : text.index("Where it wins")]
    assert "first policy\u2013\u201312.6910.71" in table and "iteration 218.3017.10 \u00b1 1.2020.7120.16" in table
    assert "AlpacaEval" not in Page(build_report(run_data(first))).words


def test_tables_are_typeset() -> None:
    assert typeset("+1.5 -> -0.2 +/- 3") == "+1.5 \u2192 \u22120.2 \u00b1 3"
    assert typeset("iteration-1 of a-b, 3-4") == "iteration-1 of a-b, 3-4"
    assert typeset("-") == "\u2013"
    assert typeset("at equal lengths 53.1 % (50.2 to 56.0)") == "at equal lengths 53.1% (50.2 to 56.0)"
