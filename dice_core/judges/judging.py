"""Compares the answers of two models, and grades answers one by one, with whichever judge the settings name.

A comparison is judged in both orders, so that what a judge thinks of a place cancels out. What is not judged is
missing: None, and never a win, a loss or a grade.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from dice_core.judges import wording
from dice_core.judges.answer_cache import AnswerCache, Reply
from dice_core.judges.chat_model import started_chat_model
from dice_core.judges.endpoint import Request, open_endpoint
from dice_core.judges.reward_model import OnProgress, started_reward_model
from dice_core.judges.settings import GradingConfig, JudgingConfig
from dice_core.judges.verdicts import MISSING, TIE, Comparison, Response, Verdict, preference_of_rewards
from dice_core.settings.base import ConfigError
from dice_core.settings.seeds import derive_seed

JUDGING, GRADING = "judging", "grading"
"""The sections of the settings."""

Reward = Literal["judge", "reward-model"]


class Grade(Protocol):
    """Grades answers: of a judge from 0 to 5, of a reward model in its own units."""

    def __call__(self, responses: Sequence[Response], on_progress: OnProgress = None) -> list[float | None]:
        """Return the grades in order; None: missing."""


# A letter, and room for a word or two around it where a server gives no log-probs.
_LETTER_TOKENS = 8


def compare(
    comparisons: Sequence[Comparison],
    config: JudgingConfig,
    *,
    model_folder: Path | None = None,
    answers: AnswerCache | None = None,
    on_progress: OnProgress = None,
) -> list[Verdict]:
    """Return the judge's verdicts, in order. Identical answers are a tie, and nobody is asked.

    Args:
        comparisons: what is compared.
        config: the judge.
        model_folder: of the judge's model, of fetch_model; an endpoint needs none.
        answers: of an endpoint: those that are known, and where new ones go.
        on_progress: called with (requests answered, all requests), now and then.

    Raises:
        ConfigError: the judge is none, or lacks its model, its address or its key.
        ModelError: the model is no such judge.
        GenerationError: vLLM failed to start.
        CostLimitError: an endpoint would cost more than endpoint_max_cost.
        EndpointError: an endpoint does not answer.
    """
    asked = list(dict.fromkeys(entry for entry in comparisons if entry.candidate != entry.incumbent))
    verdicts = dict(zip(asked, _judge(asked, config, model_folder, answers, on_progress), strict=True)) if asked else {}
    return [verdicts.get(entry, TIE) for entry in comparisons]


def _judge(
    asked: list[Comparison],
    config: JudgingConfig,
    model_folder: Path | None,
    answers: AnswerCache | None,
    on_progress: OnProgress,
) -> list[Verdict]:
    if config.judge == "none":
        raise ConfigError(f"{JUDGING}.judge: is none, so there is nobody to compare answers")
    if config.judge == "reward-model":
        return _by_rewards(asked, config, _required(model_folder, JUDGING), on_progress)
    texts = [text for entry in asked for text in comparison_texts(entry)]
    if config.judge == "endpoint":
        with open_endpoint(config, JUDGING, answers) as endpoint:
            requests = [Request(text, _LETTER_TOKENS, wants_first_tokens=True) for text in texts]
            replies = endpoint.ask(requests, on_progress)
        found = [_preference(reply, config) for reply in replies]
    else:
        with started_chat_model(_required(model_folder, JUDGING), config, JUDGING) as model:
            tokens = model.first_tokens(texts, on_progress)
        found = [wording.preference_of_tokens(entry or {}, config.min_label_mass) for entry in tokens]
    return [verdict_of(*pair) for pair in zip(found[0::2], found[1::2], strict=True)]


def comparison_texts(entry: Comparison) -> tuple[str, str]:
    """Return what a judge that chats is asked: with the candidate's answer first, and with it second."""
    return (
        wording.comparison_text(entry.prompt, entry.candidate, entry.incumbent),
        wording.comparison_text(entry.prompt, entry.incumbent, entry.candidate),
    )


def verdict_of(candidate_first: float | None, incumbent_first: float | None) -> Verdict:
    """Return the verdict of a judge's two preferences for whatever it was shown first."""
    return Verdict(candidate_first, None if incumbent_first is None else 1 - incumbent_first)


def _preference(reply: Reply | None, config: JudgingConfig) -> float | None:
    """Return the preference for what was shown first, by log-probs where there are some, else by the letter itself."""
    if reply is None:
        return None
    found = wording.preference_of_tokens(reply.first_tokens, config.min_label_mass) if reply.first_tokens else None
    return wording.preference_of_reply(reply.text) if found is None else found


def _by_rewards(
    asked: list[Comparison], config: JudgingConfig, model_folder: Path, on_progress: OnProgress
) -> list[Verdict]:
    exchanges = [pair for entry in asked for pair in ((entry.prompt, entry.candidate), (entry.prompt, entry.incumbent))]
    with started_reward_model(model_folder, config, JUDGING) as rewards:
        found = rewards(exchanges, on_progress)
    return [verdict_of_rewards(*pair) for pair in zip(found[0::2], found[1::2], strict=True)]


def verdict_of_rewards(candidate: float | None, incumbent: float | None) -> Verdict:
    """Return the verdict that two rewards mean; missing where one of them is."""
    if candidate is None or incumbent is None:
        return MISSING
    preference = preference_of_rewards(candidate, incumbent)
    return Verdict(preference, preference)


@contextmanager
def grading(
    config: GradingConfig,
    *,
    reward: Reward,
    model_folder: Path | None = None,
    seed: int = 0,
    answers: AnswerCache | None = None,
) -> Iterator[Grade]:
    """Start whoever grades, and yield a function that grades answers, as often as it is called.

    Args:
        config: how it grades.
        reward: `judge`: a chat model that grades from 0 to 5 (with a model folder in vLLM, else behind the endpoint);
            `reward-model`: a sequence classification model, in its own units.
        model_folder: of fetch_model.
        seed: of the samples of a judge.
        answers: of an endpoint: those that are known, and where new ones go.

    Raises:
        ConfigError, ModelError, GenerationError: as compare. CostLimitError and EndpointError come with the grades.
    """
    if reward == "reward-model":
        with started_reward_model(_required(model_folder, GRADING), config, GRADING) as rewards:

            def rewarded(responses: Sequence[Response], on_progress: OnProgress = None) -> list[float | None]:
                return rewards([(entry.prompt, entry.response) for entry in responses], on_progress)

            yield rewarded
    elif model_folder is not None:
        with started_chat_model(model_folder, config, GRADING, config.max_new_tokens) as model:

            def grade_here(responses: Sequence[Response], on_progress: OnProgress = None) -> list[float | None]:
                replies = model.replies(_grading_texts(responses), config, seed, on_progress)
                return [wording.mean_grade([*entry], config.min_grades) for entry in replies]

            yield grade_here
    else:
        with open_endpoint(config, GRADING, answers) as endpoint:

            def grade_there(responses: Sequence[Response], on_progress: OnProgress = None) -> list[float | None]:
                requests = [
                    Request(text, config.max_new_tokens, config.temperature, derive_seed(seed, text, sample))
                    for text in _grading_texts(responses)
                    for sample in range(config.num_grades)
                ]
                said = [None if reply is None else reply.text for reply in endpoint.ask(requests, on_progress)]
                samples = [said[start : start + config.num_grades] for start in range(0, len(said), config.num_grades)]
                return [wording.mean_grade(entry, config.min_grades) for entry in samples]

            yield grade_there


def grade(
    responses: Sequence[Response],
    config: GradingConfig,
    *,
    reward: Reward,
    model_folder: Path | None = None,
    seed: int = 0,
    answers: AnswerCache | None = None,
    on_progress: OnProgress = None,
) -> list[float | None]:
    """Return the grades of answers, in order; None: missing. See grading, which serves several calls."""
    with grading(config, reward=reward, model_folder=model_folder, seed=seed, answers=answers) as graded:
        return graded(responses, on_progress)


def _grading_texts(responses: Sequence[Response]) -> list[str]:
    return [wording.grading_text(entry.prompt, entry.response) for entry in responses]


def _required(model_folder: Path | None, section: str) -> Path:
    if model_folder is None:
        raise ConfigError(f"{section}: this judge is a model, and none was given: name its source")
    return model_folder
