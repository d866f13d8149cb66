"""Stage score: the log-probs of a shard's valid responses, and what ranks them: the implicit reward, or a given one."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dice_core.data import records
from dice_core.judges.settings import GradingConfig
from dice_core.preferences.agreement import mean_agreement, taus_by_prompt
from dice_core.preferences.reward import implicit_reward
from dice_core.preferences.settings import ScoringConfig
from dice_core.progress import Progress, doing
from dice_core.settings.base import Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.grades import Grades, check_reward, make_grades
from dice_core.stages.judge_models import REWARD
from dice_core.stages.models_agree import require_one_tokenizer, tell_same_weights
from dice_core.stages.parts import part_name, published_behind, read_input, stored_parts
from dice_core.stages.run_settings import Task
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import SCORE
from dice_core.storage import layout
from dice_core.storage.manifest import Manifest, Metric
from dice_core.storage.transfers import read_ahead

if TYPE_CHECKING:
    from dice_core.preferences.scoring import Filtered

Floats = NDArray[np.float64]

# Parts of responses on their way while one is scored, which takes much longer.
_NUM_AHEAD = 2


@leaves_reason(SCORE)
def score(
    policy_uri: str,
    reference_uri: str,
    responses_uri: str,
    output_uri: str,
    *,
    reward_uri: str = "",
    data_uri: str = "",
    scoring: Values = None,
    grading: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Compute the log-probs of valid responses under policy and reference: their difference is the implicit reward.

    Another reward can rank the responses in its place, see scoring.reward.

    Args:
        policy_uri: the model that made the responses, pi_{t-1}.
        reference_uri: the model before it, pi_{t-2}.
        responses_uri: a shard of generate, or a Parquet file (records.RESPONSES).
        output_uri: where the scores go, as part-00000-DIGEST.parquet and so on.
        reward_uri: the model that ranks the responses, where scoring.reward is one of those that need it.
        data_uri: prepare-data's output, whose prompts such a model reads.
        scoring: settings, see ScoringConfig.
        grading: settings, see GradingConfig; unless scoring.reward is implicit.
        seed: seed of the run; a judge samples its grades.
        overwrite: first delete what this stage left at its output.
    """
    config, grading_config = ScoringConfig.parse(scoring, "scoring"), GradingConfig.parse(grading, "grading")
    check_reward(config, grading_config, reward_uri=reward_uri, data_uri=data_uri)
    inputs = {"policy": policy_uri, "reference": reference_uri, "responses": responses_uri}
    # What grades does not count where nothing is graded.
    is_graded = config.reward != "implicit"
    if is_graded:
        inputs |= {"data": data_uri} | ({"reward": reward_uri} if reward_uri else {})
    return run_stage(
        SCORE,
        output_uri,
        partial(_score_parts, config=config, grading=grading_config if is_graded else None, seed=SCORE.seed(seed)),
        settings={"scoring": config, "grading": grading_config} if is_graded else {"scoring": config},
        arguments={"seed": seed} if is_graded else {},
        overwrite=overwrite,
        inputs=inputs,
    )


def _score_parts(context: StageContext, *, config: ScoringConfig, grading: GradingConfig | None, seed: int) -> Manifest:
    """Filter the responses, grade them if they are ranked by grades, and score the parts that are not stored yet."""
    from dice_core.models.cache import fetch_model
    from dice_core.preferences.scoring import score_parts

    context.inputs["responses"].require_same("policy", context.inputs["policy"])
    require_one_tokenizer(context, "policy", ("reference",))
    tell_same_weights(context, "policy", "reference")
    names = context.inputs["responses"].tables()
    files = context.inputs["responses"].manifest.files
    sizes = [files[name].num_rows or 0 for name in names]
    grades = _graded(context, names, sizes, config, grading, seed) if grading else None
    counts = _Counts(grades)
    wanted = [index for index in range(len(names)) if part_name(index) not in context.parts]
    context.ran_by["runner"] = "in-process"
    for name, table in stored_parts(context, records.SCORES):
        counts.add_scores(name, table)
    # Lazily: a shard's responses need not fit in memory. Parts already scored are read for their counts alone.
    valid = context.until_end(_counted(_valid_parts(context, names, config), counts, wanted))
    if wanted:
        policy, reference = (fetch_model(context.inputs[name].uri) for name in ("policy", "reference"))
        progress = _PartsProgress("score", sizes, wanted)
        rewards = grades.of_part if grades else None
        parts = score_parts(
            policy,
            reference,
            progress.begun(valid),
            config,
            on_progress=progress,
            rewards=rewards,
            on_placed=lambda num_devices: context.ran_by.update(devices_per_model=num_devices),
        )
        with doing("loading the models"), published_behind(context, records.SCORES, counts.add_scores) as publish:
            for index, table in parts:
                publish(index, table)
    for _ in valid:
        pass
    return context.publish({}, {**counts.metrics(), "seconds": context.seconds()})


def _graded(
    context: StageContext,
    names: list[str],
    sizes: list[int],
    config: ScoringConfig,
    grading: GradingConfig,
    seed: int,
) -> Grades:
    """Return the grades of all parts; those that are not stored are made."""
    grades = Grades(context)
    wanted = grades.missing(len(names))
    if wanted:
        progress = _PartsProgress("score: grades", sizes, wanted)
        valid = context.until_end(_valid_parts(context, [names[index] for index in wanted], config))
        tables = ((wanted[number], filtered.responses) for number, filtered in valid)
        make_grades(grades, progress.begun(tables), context, config, grading, seed=seed, on_progress=progress)
    return grades


class _PartsProgress:
    """Counts the responses of all parts, those of an earlier attempt and those that are dropped among them."""

    def __init__(self, what: str, sizes: list[int], wanted: list[int]) -> None:
        self._sizes, self._progress = sizes, Progress(what, "responses")
        self._num_before, self._num_now = sum(sizes) - sum(sizes[index] for index in wanted), 0

    def begun(self, parts: Iterable[tuple[int, pa.Table]]) -> Iterator[tuple[int, pa.Table]]:
        """Yield the parts, and take note of each that begins."""
        for index, table in parts:
            self._num_before, self._num_now = self._num_before + self._num_now, self._sizes[index]
            yield index, table

    def __call__(self, num_done: int, num_all: int) -> None:
        """Take how much of the part is done."""
        self._progress(self._num_before + self._num_now * num_done // num_all, sum(self._sizes))


@dataclass
class _Counts:
    """What the parts of a shard add up to. A part that an earlier attempt stored counts as one of this attempt."""

    grades: Grades | None
    """What ranks the responses; None: the implicit reward."""
    num_dropped: Counter[str] = field(default_factory=Counter)
    """Responses dropped before scoring, by reason."""
    num_ungraded: Counter[str] = field(default_factory=Counter)
    """Of those that went into scoring, those without a grade, by prompt."""
    num_valid: Counter[str] = field(default_factory=Counter)
    """Responses that went into scoring, by prompt."""
    num_scored: Counter[str] = field(default_factory=Counter)
    """Responses that came out of it, by prompt."""
    implicit: dict[str, Floats] = field(default_factory=dict)
    """Implicit rewards of each part."""
    given: dict[str, Floats] = field(default_factory=dict)
    """The rewards that rank its responses, where they are others."""
    taus: dict[str, Floats] = field(default_factory=dict)
    """How far the two agree, by prompt."""

    def add_responses(self, index: int, filtered: "Filtered") -> None:
        """Count a part before scoring."""
        self.num_dropped.update(filtered.num_dropped)
        self.num_valid.update(filtered.responses["prompt_id"].to_pylist())
        if self.grades:
            self.num_ungraded.update(self.grades.num_missing(index, filtered.responses))

    def add_scores(self, name: str, scores: pa.Table) -> None:
        """Count a scored part."""
        self.num_scored.update(scores["prompt_id"].to_pylist())
        self.implicit[name] = implicit_reward(scores["policy_logps"], scores["reference_logps"])
        if self.grades:
            self.given[name] = scores["reward"].to_numpy()
            prompts = np.asarray(scores["prompt_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64)
            self.taus[name] = taus_by_prompt(prompts, self.implicit[name], self.given[name])

    def metrics(self) -> dict[str, Metric]:
        """Return the numbers of the whole shard; each dropped response has one reason."""
        implicit = _in_order(self.implicit)
        num_few = sum(count for prompt, count in self.num_valid.items() if prompt not in self.num_scored)
        num_ungraded = sum(count for prompt, count in self.num_ungraded.items() if prompt in self.num_scored)
        ungraded = {"num_dropped_no_grade": num_ungraded} if self.grades else {}
        return {
            "num_scored": implicit.size,
            **{f"num_dropped_{reason}": count for reason, count in self.num_dropped.items()},
            **ungraded,
            "num_dropped_non_finite": self.num_valid.total() - num_few - num_ungraded - implicit.size,
            "num_dropped_few_finite_responses": num_few,
            **(self._of_both() if self.grades else _mean_and_std("reward", implicit)),
        }

    def _of_both(self) -> dict[str, Metric]:
        """Return what the reward that ranks is like, what the implicit one would be, and how far they agree."""
        tau, num_prompts = mean_agreement(_in_order(self.taus))
        return {
            **_mean_and_std("reward", _in_order(self.given)),
            **_mean_and_std("implicit_reward", _in_order(self.implicit)),
            **({} if tau is None else {"reward_agreement": tau}),
            "num_agreement_prompts": num_prompts,
        }


def _in_order(parts: dict[str, Floats]) -> Floats:
    """Return the values of all parts in their order: sums then do not depend on which attempt scored which part."""
    return np.concatenate([[], *(parts[name] for name in sorted(parts))])


def _mean_and_std(name: str, values: Floats) -> dict[str, Metric]:
    return {
        f"{name}_mean": float(values.mean()) if values.size else 0.0,
        f"{name}_std": float(values.std()) if values.size else 0.0,
    }


def _valid_parts(
    context: StageContext, names: list[str], config: ScoringConfig
) -> Generator[tuple[int, "Filtered"], None, None]:
    from dice_core.preferences.scoring import filter_responses

    source = context.inputs["responses"]
    look = _own_responses_checked(context) if source.is_users_file else lambda table: table

    def read(name: str) -> "Filtered":
        return filter_responses(look(read_input(context, source, records.RESPONSES, name)), config)

    yield from enumerate(read_ahead(read, names, _NUM_AHEAD))


def _own_responses_checked(context: StageContext) -> Callable[[pa.Table], pa.Table]:
    """Return what looks at a user's own responses as pair does: their token ids must be their texts.

    Nothing of that depends on the chat settings: pair has them, and compares the prompts.
    """
    from dice_core.data.chat import any_format
    from dice_core.models.loading import load_tokenizer
    from dice_core.preferences.own_responses import checked

    source = context.inputs["responses"]
    where = layout.join(source.uri, source.tables()[0])
    template = any_format(load_tokenizer(context.fetch_tokenizer("policy")))
    return lambda table: next(checked([table], records.PROMPTS.empty_table(), template, where))


def _counted(
    parts: Generator[tuple[int, "Filtered"], None, None], counts: _Counts, wanted: list[int]
) -> Generator[tuple[int, pa.Table], None, None]:
    with closing(parts):
        for index, filtered in parts:
            counts.add_responses(index, filtered)
            if index in wanted:
                yield index, filtered.responses


def score_in_run(task: Task, responses_uri: str) -> StageReport:
    """Score a shard's responses at their place in a run; see score."""
    return score(
        task.policy_uri(task.iteration - 1),
        task.policy_uri(task.iteration - 2),
        responses_uri,
        task.uri,
        reward_uri=task.judge_uri(REWARD),
        data_uri=task.data_uri,
        seed=task.plan["seed"],
        **task.settings(SCORE),
    )
