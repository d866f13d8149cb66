"""The grades of a shard's responses, where a judge or a reward model ranks them: made part by part, and stored.

A part's grades are stored before the log-probs of any part are computed: the judge's engine has the accelerator to
itself, and an attempt that was killed is not paid for again. They stay beside the scores, for people to look at.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dice_core.data import records
from dice_core.judges.settings import GradingConfig
from dice_core.judges.verdicts import Response
from dice_core.models.files import ModelKind
from dice_core.preferences.settings import ScoringConfig
from dice_core.settings.base import ConfigError
from dice_core.stages.judged_answers import answer_cache
from dice_core.stages.parts import read_input
from dice_core.stages.runner import StageContext
from dice_core.storage.contract import UnfitError

Floats = NDArray[np.float64]

_NAME = "grades-{:05d}.json"
_NAMES = re.compile(r"grades-(\d{5})\.json")


def check_reward(scoring: ScoringConfig, grading: GradingConfig, *, reward_uri: str, data_uri: str) -> None:
    """Check that whoever ranks the responses is there.

    Args:
        scoring: says who it is.
        grading: its endpoint, if it has one.
        reward_uri: the model, or where it comes from; empty: none is given.
        data_uri: the texts of the prompts.

    Raises:
        ConfigError: a reward lacks its model, or has one that it would not use.
    """
    reward = scoring.reward
    if reward == "implicit" and reward_uri:
        raise ConfigError(
            f"scoring.reward: is 'implicit', which uses no model of rewards: set 'reward-model' or 'judge', or leave "
            f"out {reward_uri}"
        )
    if reward == "reward-model" and not reward_uri:
        raise ConfigError("scoring.reward: 'reward-model' needs the model that gives rewards, and none is given")
    if reward == "judge" and bool(reward_uri) == bool(grading.endpoint_url):
        found = "both are given" if reward_uri else "neither is given"
        raise ConfigError(
            f"scoring.reward: 'judge' needs a chat model of its own or grading.endpoint_url, one of them; {found}"
        )
    if reward != "implicit" and not data_uri:
        raise ConfigError(f"scoring.reward: {reward!r} reads the texts of the prompts: give the data of prepare-data")


class Grades:
    """Grades of parts of responses, by index: those of an earlier attempt, and new ones."""

    def __init__(self, context: StageContext) -> None:
        """Read the grades that are stored."""
        self._context = context
        self._by_part = {int(found[1]): _read(context, name) for name in context.parts if (found := _NAMES.match(name))}

    def missing(self, num_parts: int) -> list[int]:
        """Return the indices of the parts that have no grades yet."""
        return [index for index in range(num_parts) if index not in self._by_part]

    def add(self, index: int, grades: Sequence[float | None]) -> None:
        """Store the grades of a part's valid responses, in their order; None: missing."""
        path = self._context.write_json({"grades": list(grades)}, _NAME.format(index))
        is_ours = self._context.publish_part(path.name, path)
        self._by_part[index] = list(grades) if is_ours else _read(self._context, path.name)

    def of_part(self, index: int, responses: pa.Table) -> Floats:
        """Return the grades of a part. Shape: (responses,), NaN where one is missing.

        Raises:
            UnfitError: they are of another number of responses.
        """
        found = self._by_part[index]
        if len(found) != responses.num_rows:
            raise UnfitError(
                f"{self._context.uri}: {_NAME.format(index)} has {len(found)} grades of {responses.num_rows} "
                "responses: take a new run name, or pass --overwrite"
            )
        return np.array([np.nan if grade is None else grade for grade in found], dtype=np.float64)

    def num_missing(self, index: int, responses: pa.Table) -> Mapping[str, int]:
        """Return how many responses of a part have no grade, by prompt."""
        is_missing = np.isnan(self.of_part(index, responses))
        return Counter(responses["prompt_id"].filter(pa.array(is_missing)).to_pylist())


def make_grades(
    grades: Grades,
    parts: Iterable[tuple[int, pa.Table]],
    context: StageContext,
    scoring: ScoringConfig,
    grading: GradingConfig,
    *,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Grade parts of valid responses, each stored when it is done.

    Args:
        grades: gets them.
        parts: indices and tables of RESPONSES.
        context: of the stage, with the inputs `data` and, where it is a model that grades, `reward`.
        scoring: says who grades.
        grading: says how.
        seed: of a judge's samples.
        on_progress: called with (requests answered, all requests) within a part.
    """
    from dice_core.judges.judging import grading as started_grading
    from dice_core.models.cache import fetch_model

    model, is_judge = context.inputs.get("reward"), scoring.reward == "judge"
    kind: ModelKind = "language-model" if is_judge else "reward-model"
    prompts = read_input(context, context.inputs["data"], records.PROMPTS, "prompts")
    with started_grading(
        grading,
        reward="judge" if is_judge else "reward-model",
        model_folder=fetch_model(model.uri, kind=kind) if model else None,
        seed=seed,
        answers=None if model else answer_cache(context),
    ) as grade:
        for index, responses in parts:
            grades.add(index, grade(_to_grade(responses, prompts, context), on_progress))


def _to_grade(responses: pa.Table, prompts: pa.Table, context: StageContext) -> list[Response]:
    rows = pc.index_in(responses["prompt_id"], value_set=prompts["prompt_id"].combine_chunks())
    if rows.null_count:
        raise UnfitError(
            f"{context.inputs['responses'].uri}: {rows.null_count} responses are to prompts that "
            f"{context.inputs['data'].uri} does not have: give the data that they were made from"
        )
    texts = records.take_text(prompts["prompt"], np.asarray(rows, dtype=np.int64))
    columns = (responses["prompt_id"], texts, responses["response"])
    return [Response(*row) for row in zip(*(column.to_pylist() for column in columns), strict=True)]


def _read(context: StageContext, name: str) -> list[float | None]:
    key = context.parts[name].key
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        values = json.loads(context.stored.fetch(Path(folder), [key])[key].read_text())
    found: list[float | None] = values["grades"]
    return found
