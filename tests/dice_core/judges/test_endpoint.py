"""An endpoint with the faults of real ones: what fails is missing, nothing is paid for twice, and no key is told."""

import math
from collections.abc import Iterator
from typing import Any

import pytest

from dice_core.judges.answer_cache import AnswerCache, Record
from dice_core.judges.endpoint import CostLimitError, EndpointError
from dice_core.judges.judging import compare, grade
from dice_core.judges.settings import GradingConfig, JudgingConfig
from dice_core.judges.verdicts import MISSING, TIE, Comparison, Response, Verdict
from dice_core.settings.base import ConfigError
from tests.faulty_endpoint import FaultyEndpoint, completion, faulty_endpoint, told

KEY = "sk-secret-0123456789"
COMPARISONS = [Comparison(str(number), f"Question {number}?", "good", "bad") for number in range(4)]
ORDERS = 2


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DICE_JUDGE_API_KEY", KEY)


def prefers_good(body: dict[str, Any]) -> tuple[int, str]:
    """Answer as a judge that finds "good" better, four to one, and says so with log-probs where they are asked for."""
    text = body["messages"][0]["content"]
    first = "A" if text.index("good") < text.index("bad") else "B"
    tokens = {first: math.log(0.8), "B" if first == "A" else "A": math.log(0.2)}
    return 200, completion(first, tokens if body.get("logprobs") else None)


@pytest.fixture
def server() -> Iterator[FaultyEndpoint]:
    with faulty_endpoint(prefers_good, key=KEY) as running:
        yield running


def config(server: FaultyEndpoint, **changes: Any) -> JudgingConfig:
    given = {"judge": "endpoint", "endpoint_url": server.url, "endpoint_model": "judge", "endpoint_concurrency": 1}
    return JudgingConfig.parse({**given, **changes}, "judging")


def preferences(verdicts: list[Verdict]) -> list[float | None]:
    return [verdict.preference and round(verdict.preference, 6) for verdict in verdicts]


def test_both_orders_are_asked_and_identical_answers_are_a_tie_at_no_cost(server: FaultyEndpoint) -> None:
    same = Comparison("same", "Question?", "alike", "alike")
    verdicts = compare([COMPARISONS[0], same, COMPARISONS[1].swapped()], config(server))
    assert verdicts[1] == TIE
    assert preferences(verdicts) == [0.8, 0.5, 0.2] and not verdicts[0].flipped
    assert len(server.bodies) == 2 * ORDERS
    assert {body["model"] for body in server.bodies} == {"judge"}


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop"])
def test_what_passes_is_tried_again(server: FaultyEndpoint, fault: str) -> None:
    server.faults[:] = [fault, fault] if fault != "drop" else [fault]
    assert preferences(compare(COMPARISONS[:1], config(server))) == [0.8]
    assert len(server.bodies) == ORDERS + (2 if fault != "drop" else 1)


@pytest.mark.parametrize("fault", ["html", "garbage", "array", "no choices", "content of another form", "400"])
def test_what_is_no_reply_is_missing_and_no_win(
    server: FaultyEndpoint, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults[:] = [fault]
    verdicts = compare(COMPARISONS, config(server))
    assert preferences(verdicts) == [None, 0.8, 0.8, 0.8]
    assert verdicts[0].candidate_first is None and verdicts[0].candidate_second is not None
    assert verdicts[0].flipped is None
    told_people = capsys.readouterr().err
    assert "its verdict is missing" in told_people and KEY not in told_people


@pytest.mark.slow
def test_a_request_that_takes_too_long_is_given_up(server: FaultyEndpoint) -> None:
    server.faults[:] = ["hang"]
    verdicts = compare(COMPARISONS[:2], config(server, endpoint_timeout=1, endpoint_retries=0))
    assert preferences(verdicts) == [None, 0.8]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (completion("A"), Verdict(1.0, 0.0)),
        (completion("I cannot choose between them."), MISSING),
        (completion(None), MISSING),
        (completion("The", {"The": math.log(0.9), "A": math.log(0.05)}), MISSING),
        # The letter comes behind a sign: the first token tells nothing, the text does.
        (completion("**B**", {"**": math.log(0.9)}), Verdict(0.0, 1.0)),
    ],
)
def test_a_reply_is_a_letter_or_missing(reply: str, verdict: Verdict) -> None:
    """The first is a judge that always says A: it prefers nobody, and flips."""
    with faulty_endpoint(told([reply]), key=KEY) as server:
        (found,) = compare(COMPARISONS[:1], config(server))
    assert found == verdict
    if verdict != MISSING:
        assert (found.preference, found.flipped) == (0.5, True)


def test_a_server_without_log_probs_is_asked_for_a_letter() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, str]:
        for name in ("logprobs", "max_tokens", "temperature"):
            if name in body:
                return 400, f'{{"error": {{"message": "{refusals[name]}"}}}}'
        return prefers_good(body)

    refusals = {
        "logprobs": "logprobs are not supported with this model",
        "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model",
    }
    with faulty_endpoint(answer, key=KEY) as server:
        assert preferences(compare(COMPARISONS, config(server))) == [1.0] * 4
        # What is refused once is sent no more.
        assert len(server.bodies) == 4 * ORDERS + 3
    assert server.bodies[-1]["max_completion_tokens"] == 8


def test_requests_are_made_side_by_side_and_no_more_than_allowed(server: FaultyEndpoint) -> None:
    many = [Comparison(str(number), f"Question {number}?", "good", "bad") for number in range(30)]
    done: list[tuple[int, int]] = []
    verdicts = compare(many, config(server, endpoint_concurrency=3), on_progress=lambda *counts: done.append(counts))
    assert preferences(verdicts) == [0.8] * 30
    assert server.most_at_a_time <= 3
    assert done[-1] == (60, 60) and sorted(done) == done


def test_nothing_is_paid_for_twice_and_failures_are_asked_again(server: FaultyEndpoint) -> None:
    stored: list[Record] = []
    server.faults[:] = ["400"]
    first = compare(COMPARISONS, config(server), answers=AnswerCache(store=stored.extend, num_together=3))
    assert preferences(first) == [None, 0.8, 0.8, 0.8]
    assert len(stored) == 4 * ORDERS - 1
    server.bodies.clear()
    again = compare(COMPARISONS, config(server), answers=AnswerCache(stored, stored.extend))
    assert preferences(again) == [0.8] * 4
    assert len(server.bodies) == 1
    # Of another model nothing is known.
    server.bodies.clear()
    compare(COMPARISONS[:1], config(server, endpoint_model="other"), answers=AnswerCache(stored, stored.extend))
    assert len(server.bodies) == ORDERS
    assert KEY not in str(stored)


def costs(server: FaultyEndpoint, limit: float) -> JudgingConfig:
    """Return prices at which a reply costs 0.00104, and may cost 0.007 at most before it is there."""
    prices = {"endpoint_input_price": 10, "endpoint_output_price": 20, "endpoint_max_cost": limit}
    return config(server, **prices)


def test_judging_stops_before_it_costs_more_and_goes_on_with_a_higher_limit(server: FaultyEndpoint) -> None:
    stored: list[Record] = []
    with pytest.raises(CostLimitError) as caught:
        compare(COMPARISONS, costs(server, 0.012), answers=AnswerCache(store=stored.extend))
    assert "\n" not in str(caught.value)
    num_paid = len(stored)
    assert 0 < num_paid < 8
    assert str(caught.value).startswith(
        f"judging.endpoint_max_cost: {num_paid} of 8 requests were made, all answers have cost {num_paid * 0.00104:.4g}"
    )
    # Started again, it has spent what it had spent: nothing more is asked.
    server.bodies.clear()
    with pytest.raises(CostLimitError):
        compare(COMPARISONS, costs(server, 0.012), answers=AnswerCache(stored, stored.extend))
    assert server.bodies == []
    assert preferences(compare(COMPARISONS, costs(server, 1), answers=AnswerCache(stored))) == [0.8] * 4
    assert len(server.bodies) == 8 - num_paid


def test_what_a_server_does_not_count_costs_as_much_as_it_can() -> None:
    with faulty_endpoint(told([completion("A", usage=False)]), key=KEY) as server:
        answers = AnswerCache()
        compare(COMPARISONS[:1], config(server), answers=answers)
    sent, came = answers.num_tokens
    assert sent > 2 * 600 and came == 2 * 8


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", "judging.endpoint_url: URL refuses the key in DICE_JUDGE_API_KEY (HTTP 401): put another one there"),
        ("404", "judging.endpoint_model: URL knows no model 'judge', or is no address of OpenAI's API"),
    ],
)
def test_a_wrong_key_or_model_ends_the_work_at_the_first_request(
    server: FaultyEndpoint, fault: str, message: str
) -> None:
    server.faults[:] = [fault] * 9
    with pytest.raises(ConfigError) as caught:
        compare(COMPARISONS, config(server))
    assert str(caught.value).startswith(message.replace("URL", server.url))
    assert KEY not in str(caught.value) and len(server.bodies) == 1


@pytest.mark.slow
def test_a_server_that_is_away_ends_the_work_and_what_is_paid_for_is_kept(server: FaultyEndpoint) -> None:
    many = [Comparison(str(number), f"Question {number}?", "good", "bad") for number in range(40)]
    stored: list[Record] = []
    server.faults[:] = ["", "", *["400"] * 40]
    with pytest.raises(EndpointError, match="20 requests in a row have failed, the last with: HTTP 400") as caught:
        compare(many, config(server), answers=AnswerCache(store=stored.extend))
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)
    assert len(stored) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint_url": ""}, "judging.endpoint_url: is empty, and an endpoint is to judge"),
        ({"endpoint_model": ""}, "judging.endpoint_model: is empty, and an endpoint is to judge"),
        ({"endpoint_key_variable": "MISSING_KEY"}, "judging.endpoint_key_variable: MISSING_KEY is not set here: fill"),
    ],
)
def test_an_endpoint_without_an_address_a_model_or_a_key_is_refused(
    server: FaultyEndpoint, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(COMPARISONS, config(server, **changes))
    assert server.bodies == []


def test_a_grade_is_the_mean_of_seven_samples_of_which_three_can_be_read() -> None:
    replies = ["Grade: 5", "Grade: 9", "none", "Grade: 4", "Grade: 3", "?", "?", *["Grade: 6"] * 7]
    responses = [Response("a", "Question?", "good"), Response("b", "Question?", "bad")]
    with faulty_endpoint(told([completion(reply) for reply in replies]), key=KEY) as server:
        grading = GradingConfig(endpoint_url=server.url, endpoint_model="judge", endpoint_concurrency=1)
        assert grade(responses, grading, reward="judge", seed=3) == [4.0, None]
    assert len({body["seed"] for body in server.bodies}) == 14
    assert {body["temperature"] for body in server.bodies} == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint_max_cost": 5.0}, "endpoint_max_cost needs endpoint_input_price and endpoint_output_price"),
        ({"endpoint_url": "api.example.com"}, "endpoint_url must be http:// or https://"),
        ({"endpoint_url": "https://me:pass@api.example.com/v1"}, "endpoint_url must hold no name, password or query"),
        ({"endpoint_url": "https://api.example.com/v1?key=1"}, "endpoint_url must hold no name, password or query"),
        ({"judge": "gpt"}, "judging.judge: should be 'none', 'reward-model', 'chat-logprob' or 'endpoint'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JudgingConfig.parse(changes, "judging")
