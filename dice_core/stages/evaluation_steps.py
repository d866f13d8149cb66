"""The steps of an evaluation, each kept when it is done: answers, log-probs, verdicts. A killed attempt goes on there.

Tables are kept under names that say what decides them. The next evaluation of a run finds those of the models that it
meets again, and neither samples from these nor loads them. evaluation/ does the work of each step.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dice_core.accelerator import require_promised_gpu
from dice_core.data import records
from dice_core.data.settings import ChatConfig
from dice_core.evaluation.answers import answers_of, prompts_to_answer, sample_answers, sampling
from dice_core.evaluation.estimates import Floats
from dice_core.evaluation.held_out import ANSWER_LOGPS, PAIR_LOGPS, HeldOutPairs, as_array, score_under, tokenise_pairs
from dice_core.evaluation.measuring import NO_JUDGE, PairLogps, refused_unmeasured, summarise
from dice_core.evaluation.result import Answer, Evaluation, Sample
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.evaluation.verdict_table import VERDICTS, comparisons_of, verdict_table, with_verdicts
from dice_core.generation.settings import GenerationConfig
from dice_core.judges.judging import compare
from dice_core.judges.settings import JudgingConfig
from dice_core.models.cache import fetch_model
from dice_core.models.files import ModelError
from dice_core.models.weights import check_finite
from dice_core.preferences.reward import implicit_reward
from dice_core.preferences.scoring import require_mostly_finite
from dice_core.progress import Progress, log
from dice_core.settings.base import Settings
from dice_core.stages.judged_answers import answer_cache
from dice_core.stages.models_agree import require_one_tokenizer
from dice_core.stages.parts import read_input
from dice_core.stages.runner import Input, StageContext
from dice_core.stages.table import EVALUATE
from dice_core.storage.manifest import read_manifest

_ROLES = {
    "policy": "new policy",
    "incumbent": "incumbent",
    "previous": "previous policy",
    "base_reference": "base reference",
    "first": "first policy",
}
"""The models that are inputs, and what the log calls them."""
_SCORING_PAIRS = frozenset({"policy", "incumbent", "previous", "base_reference"})
_SCORING_ANSWERS = ("policy", "first")
_KEY_DIGITS = 16


@dataclass(frozen=True)
class EvaluationPlan:
    """What decides an evaluation beside its models and data."""

    evaluation: EvaluationConfig
    judging: JudgingConfig
    generation: GenerationConfig
    chat: ChatConfig
    seed: int
    """Of the run."""
    earlier_uri: str = ""
    """An evaluation whose tables may be taken."""


def measure(context: StageContext, plan: EvaluationPlan) -> Evaluation:
    """Sample, score, judge and decide.

    Args:
        context: with the inputs policy, incumbent, previous, base_reference, first, data, and judge where that is a
            model.
        plan: settings.

    Raises:
        UnfitError: a model has another tokenizer than the policy.
        ModelError: another model than the policy is broken.
    """
    require_one_tokenizer(context, "policy", ("previous", "base_reference", "first", "incumbent"))
    context.ran_by |= {"runner": "in-process", "tensor_parallel_size": plan.generation.tensor_parallel_size}
    return _Steps(context, plan).run()


class _BrokenPolicyError(ModelError):
    """Nothing can be sampled from the policy: the gate refuses it."""


class _Steps:
    """The steps, with what they share."""

    def __init__(self, context: StageContext, plan: EvaluationPlan) -> None:
        self._context, self._plan = context, plan
        self._held_out = read_input(context, context.inputs["data"], records.PREFERENCES, "held_out")
        self._prompts = prompts_to_answer(self._held_out, plan.evaluation.num_sample_prompts)
        self._sampling = sampling(plan.generation, plan.evaluation, self._prompts.num_rows)
        self._tables = _Tables(context, plan.earlier_uri)

    def run(self) -> Evaluation:
        """Do what is not done yet."""
        plan = self._plan
        try:
            answers = (self._answers("policy"), self._answers("incumbent"))
            previous = self._previous()
        except _BrokenPolicyError as error:
            return refused_unmeasured(str(error), plan.evaluation, judge=plan.judging.judge)
        pairs = tokenise_pairs(self._held_out, self._model("policy"), plan.chat)
        logps = self._logps(pairs, answers)
        samples = self._samples(answers, logps)
        measured = PairLogps(
            policy=self._of_pairs(logps, "policy"),
            incumbent=self._of_pairs(logps, "incumbent"),
            previous=self._of_pairs(logps, "previous"),
            base=self._of_pairs(logps, "base_reference"),
            num_too_long=pairs.num_too_long,
        )
        if plan.judging.judge != NO_JUDGE:
            samples = self._judged(samples)
        return summarise(
            measured, samples, plan.evaluation, previous=previous, judge=plan.judging.judge, seed=plan.seed
        )

    def _digest(self, role: str) -> str:
        return self._context.inputs[role].manifest.content_digest

    def _model(self, role: str) -> Path:
        return fetch_model(self._context.inputs[role].uri)

    def _answers(self, role: str) -> pa.Table:
        """Return one answer of a model to each prompt."""
        plan, prompts = self._plan, self._prompts["prompt_id"].to_pylist()
        key = _key(self._digest(role), self._sampling, plan.chat, plan.seed, *prompts)
        name = f"answers-{key}"
        if (found := self._tables.find(name, records.RESPONSES)) is not None:
            return found
        require_promised_gpu()
        folder = self._model(role)
        try:
            # vLLM would sample from what are no numbers, without a word.
            check_finite(folder)
        except ModelError as error:
            if role != "policy":
                raise
            raise _BrokenPolicyError(str(error).removeprefix(f"{folder}/")) from None
        made = sample_answers(folder, self._prompts, self._sampling, plan.chat, seed=plan.seed, role=_ROLES[role])
        return self._tables.keep(name, made, records.RESPONSES)

    def _previous(self) -> list[Answer] | None:
        """Return the answers of the policy before the candidate; None: it is the incumbent."""
        if self._digest("previous") == self._digest("incumbent"):
            return None
        found = self._answers("previous")
        return answers_of(found, [None] * found.num_rows)

    def _logps(self, pairs: HeldOutPairs, answers: tuple[pa.Table, pa.Table]) -> dict[str, "_Logps"]:
        """Return the log-probs under each model by its digest: whatever roles it has, it is in memory once."""
        plan, roles = self._plan, dict[str, list[str]]()
        for role in _ROLES:
            roles.setdefault(self._digest(role), []).append(role)
        of_pairs = _key(plan.evaluation.dtype, *((g.prompt_token_ids, g.responses) for g in pairs.groups))
        of_answers = _key(plan.evaluation.dtype, *(table["response_token_ids"].to_pylist() for table in answers))
        return {
            digest: self._under(
                names,
                "" if _SCORING_PAIRS.isdisjoint(names) else f"logps-{_key(digest, of_pairs)}",
                "" if {*_SCORING_ANSWERS}.isdisjoint(names) else f"answer-logps-{_key(digest, of_answers)}",
                pairs,
                answers,
            )
            for digest, names in roles.items()
        }

    def _under(
        self,
        roles: Sequence[str],
        name: str,
        answers_name: str,
        pairs: HeldOutPairs,
        answers: tuple[pa.Table, pa.Table],
    ) -> "_Logps":
        """Return the log-probs under a model; a table without a name is not wanted."""
        known = _Logps(self._tables.find(name, PAIR_LOGPS), self._tables.find(answers_name, ANSWER_LOGPS))
        lacks_pairs, lacks_answers = bool(name) and known.pairs is None, bool(answers_name) and known.answers is None
        if not (lacks_pairs or lacks_answers):
            return known
        made = score_under(
            self._model(roles[0]),
            self._plan.evaluation,
            " and ".join(_ROLES[role] for role in roles),
            pairs=pairs if lacks_pairs else None,
            answers=answers if lacks_answers else None,
            on_placed=self._note_devices,
        )
        return _Logps(
            known.pairs if made[0] is None else self._tables.keep(name, made[0], PAIR_LOGPS),
            known.answers if made[1] is None else self._tables.keep(answers_name, made[1], ANSWER_LOGPS),
        )

    def _note_devices(self, num_devices: int) -> None:
        noted = self._context.ran_by
        noted["devices_per_model"] = max(num_devices, int(noted.get("devices_per_model", 0)))

    def _of_pairs(self, logps: "dict[str, _Logps]", role: str) -> Floats:
        """Return the log-probs of the held-out pairs under a model; the gate refuses a policy that gives no numbers.

        Raises:
            ModelError: another model gives none.
        """
        found = logps[self._digest(role)].pairs
        values = as_array(found)  # (pairs, 2)
        if self._digest(role) != self._digest("policy"):
            num_non_finite = int((~np.isfinite(values)).any(axis=1).sum())
            what = f"held-out pairs under the {_ROLES[role]} ({self._context.inputs[role].uri})"
            require_mostly_finite(num_non_finite, len(values), what)
        return values

    def _samples(self, answers: tuple[pa.Table, pa.Table], logps: "dict[str, _Logps]") -> list[Sample]:
        new, old = (as_array(logps[self._digest(role)].answers) for role in _SCORING_ANSWERS)  # (prompts, 2) each
        rewards = implicit_reward(new, old)  # (prompts, 2), of both models' answers
        known = [[float(value) if np.isfinite(value) else None for value in column] for column in rewards.T]
        prompts = (self._prompts[name].to_pylist() for name in ("prompt_id", "prompt"))
        both = zip(*prompts, answers_of(answers[0], known[0]), answers_of(answers[1], known[1]), strict=True)
        return [Sample(prompt_id, prompt, incumbent, policy) for prompt_id, prompt, policy, incumbent in both]

    def _judged(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples with the judge's verdicts."""
        judging, asked = self._plan.judging, comparisons_of(samples)
        kind = judging.model_kind
        # Of these answers and this judge: those of the evaluation before are of others, mostly.
        key = _key(judging, self._digest("judge") if kind else "", [asdict(entry) for entry in asked])
        if (found := self._tables.find(f"verdicts-{key}", VERDICTS)) is None:
            judge = fetch_model(self._context.inputs["judge"].uri, kind=kind) if kind else None
            log(f"evaluate: {judging.judge} compares answers to {len(samples)} prompts")
            progress = Progress("evaluate: judging", "requests", tells_end=False)
            verdicts = compare(
                asked,
                judging,
                model_folder=judge,
                answers=answer_cache(self._context),
                on_progress=progress,
            )
            found = self._tables.keep(f"verdicts-{key}", verdict_table(samples, verdicts), VERDICTS)
        return with_verdicts(samples, found)


@dataclass(frozen=True)
class _Logps:
    """Log-probs under one model; None where nobody asks for them."""

    pairs: pa.Table | None
    """PAIR_LOGPS."""
    answers: pa.Table | None
    """ANSWER_LOGPS."""


class _Tables:
    """Tables that were kept: by this attempt or an earlier one, or by the evaluation before."""

    def __init__(self, context: StageContext, earlier_uri: str) -> None:
        self._context = context
        manifest = read_manifest(earlier_uri) if earlier_uri else None
        is_one = manifest is not None and manifest.stage == EVALUATE.name
        self._earlier = Input(earlier_uri, manifest) if manifest and is_one else None

    def find(self, name: str, schema: pa.Schema) -> pa.Table | None:
        """Return a table, or None: it was not made yet."""
        if not name:
            return None
        if _file(name) in self._context.parts:
            return read_input(self._context, self._context.stored, schema, f"{name}-")
        if self._earlier is None or not self._earlier.tables(f"{name}-"):
            return None
        log(f"evaluate: {name} is that of {self._earlier.uri}")
        return self.keep(name, read_input(self._context, self._earlier, schema, f"{name}-"), schema)

    def keep(self, name: str, table: pa.Table, schema: pa.Schema) -> pa.Table:
        """Store a table, and return the one that counts: another attempt may have been first."""
        path = self._context.write_table(table, schema, _file(name))
        if self._context.publish_part(_file(name), path):
            return table
        return read_input(self._context, self._context.stored, schema, f"{name}-")


def _file(name: str) -> str:
    return f"{name}.parquet"


def _key(*facts: Any) -> str:
    """Return what identifies a table: everything that decides it, operational settings left out."""
    plain = [fact.fingerprint() if isinstance(fact, Settings) else fact for fact in facts]
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]
