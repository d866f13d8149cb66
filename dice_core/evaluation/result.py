"""What the evaluation of a policy found: evaluation.json, every number of it under the name that the report shows.

Candidate is the new policy, incumbent the promoted model that it is compared with (the run's first policy while nothing
is promoted). A number is of the candidate where its name says nothing else. What could not be measured is left out, so
that no number is null or not finite. `measuring.py` fills this in; it stores nothing.

    metrics         flat; the manifest of the stage and summary.json hold the same under the same names
      NAME, NAME_low, NAME_high, NAME_se        a value, its 95 % interval, its standard error; of those marked *
      judged answers, absent without a judge
        win_rate *                              mean preference for the candidate, 0 to 1; a tie is one half
        length_controlled_win_rate *            the same, had both answered at one length
        sign_test_p                             two-sided, of wins against losses
        num_wins, num_ties, num_losses          prompts; a judge that changes its mind with the order gives a tie
        num_judged_prompts, num_missing_verdicts, share_parsed_verdicts
        flip_rate                               share of verdicts that change with the order
        num_same_answers                        prompts with one text twice: ties that no judge saw
        reward_judge_agreement *                share of judged prompts whose implicit rewards order the answers as the
                                                judge does, ties left out
      what these numbers can show
        detectable_difference                   in the measure that decides (win rate, or the change of accuracy), at
                                                80 % power, two-sided 5 %
        num_needed                              prompts (without a judge: pairs) that would show
                                                evaluation.wanted_difference
      held-out pairs, implicit reward in nats against the run's base reference, without beta
        heldout_reward_accuracy *, heldout_reward_accuracy_incumbent *, heldout_reward_accuracy_previous *
        heldout_reward_accuracy_change *        candidate - incumbent, on the same pairs
        heldout_reward_accuracy_change_previous *          candidate - previous policy
        heldout_reward_margin *, heldout_reward_margin_incumbent *, heldout_reward_margin_change *
        heldout_chosen_reward *, heldout_rejected_reward *
        heldout_step_accuracy *, heldout_step_margin *     against the previous policy: the reward of the next iteration
        num_held_out_pairs, num_heldout_ties, num_heldout_ties_incumbent, num_too_long_pairs, num_non_finite_pairs
      sampled answers, one to a prompt
        num_sample_prompts
        mean_response_characters *, mean_response_characters_incumbent *, mean_response_characters_previous *
        response_characters_change *            characters
        response_characters_growth *            share of the incumbent's mean length
        response_characters_growth_previous *   share of the previous policy's
        share_empty_responses *, share_empty_responses_incumbent *
        share_cut_responses *, share_cut_responses_incumbent *, share_cut_responses_change *
        share_cut_responses_previous *, share_cut_responses_change_previous *
        num_distinct_responses
        drift_per_token *                       nats: mean of log p(candidate) - log p(first policy) over the tokens of
                                                the candidate's answers
      the decision
        accepted, promotable                    0 or 1
        outcome                                 better | not shown | worse
        reason                                  one line
    gate            outcome, accepted, promotable, reason, power (what so many prompts can show, a line),
                    warnings: list of lines, and
      rules         list of {name, what, kind, value, low, high, bound, passed, sentence}
        kind        gain: all of them make a policy better; guard: refuses a policy when broken, against the previous
                    policy; evidence: only bars its promotion (with names incumbent_*: a guard against the incumbent,
                    where that is another than the previous policy)
        value, low, high   null where not known
        bound       what is compared with: low of a gain is above it; a guard's value is not beyond it
        passed      true, false (of a guard: beyond the bound by more than chance), or null: not shown either way
    judging         judge, wanted_difference, and from the metrics: num_prompts, num_missing, flip_rate,
                    detectable_difference, num_needed, win, tie, loss; null where not known
    compared_with   uri, what: "promoted model" | "first policy" | "given model"; promoted_uri: the pointer, or empty;
                    promoted_digest: of the model it named when the stage began, empty where this is not the incumbent
    samples         one a prompt, in the order of the held-out prompts:
                    {prompt_id, prompt, incumbent: ANSWER, policy: ANSWER, verdict: null or
                    {candidate_first, candidate_second, preference, flipped}}
      ANSWER        text, is_cut, num_tokens, reward (implicit, nats, candidate against first policy; null: not known)
    seconds         of the stage
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dice_core.evaluation.estimates import Estimate
from dice_core.evaluation.gate import Gate
from dice_core.judges.verdicts import Verdict
from dice_core.storage.manifest import Metric

What = Literal["promoted model", "first policy", "given model"]

SHOWN = (
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "length_controlled_win_rate",
    "length_controlled_win_rate_low",
    "length_controlled_win_rate_high",
    "heldout_reward_accuracy",
    "heldout_reward_accuracy_incumbent",
    "response_characters_growth",
    "drift_per_token",
    "detectable_difference",
    "accepted",
    "promotable",
)
"""The numbers that KFP's own table gets, which is to be read at a glance; all are in evaluation.json."""


@dataclass(frozen=True)
class Answer:
    """A response's text, stripped, and whether the token limit ended it."""

    text: str
    is_cut: bool
    num_tokens: int = 0
    reward: float | None = None
    """Implicit reward without beta, nats: log-prob under the candidate minus that under the first policy."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, how both models answer it, and what the judge says."""

    prompt_id: str
    prompt: str
    incumbent: Answer
    policy: Answer
    verdict: Verdict | None = None
    """None: nobody was asked."""

    @property
    def is_tie(self) -> bool:
        """Whether both models say the same: no judge needs to read it."""
        return self.incumbent.text == self.policy.text

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        verdict = self.verdict and {
            "candidate_first": self.verdict.candidate_first,
            "candidate_second": self.verdict.candidate_second,
            "preference": self.verdict.preference,
            "flipped": self.verdict.flipped,
        }
        return {**asdict(self), "verdict": verdict}


@dataclass(frozen=True)
class ComparedWith:
    """The incumbent: where it is, and why it is this one."""

    uri: str
    what: What
    promoted_uri: str = ""
    """The pointer that was read; empty: none."""
    promoted_digest: str = ""
    """Content digest of the promoted model; empty: the incumbent is another one."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and the decision."""

    estimates: dict[str, Estimate]
    counts: dict[str, int | float]
    """Numbers without an error."""
    gate: Gate
    samples: list[Sample] = field(default_factory=list)
    judge: str = "none"
    wanted_difference: float = 0.04

    @property
    def accepted(self) -> bool:
        """Whether the run may go on with the candidate."""
        return self.gate.accepted

    @property
    def promotable(self) -> bool:
        """Whether the candidate is to take the incumbent's place."""
        return self.gate.promotable

    def metrics(self) -> dict[str, Metric]:
        """Return all numbers, flat; what could not be measured is left out."""
        numbers: dict[str, float] = {}
        for name, estimate in self.estimates.items():
            ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high, "_se": estimate.standard_error}
            numbers |= {f"{name}{suffix}": value for suffix, value in ends.items() if not math.isnan(estimate.value)}
        known = {name: value for name, value in {**numbers, **self.counts}.items() if math.isfinite(value)}
        decided = {"accepted": int(self.accepted), "promotable": int(self.promotable)}
        return {**known, **decided, "outcome": self.gate.outcome, "reason": self.gate.reason}

    def to_dict(self, compared_with: ComparedWith) -> dict[str, Any]:
        """Return evaluation.json, but for its seconds."""
        return {
            "metrics": self.metrics(),
            "gate": asdict(self.gate),
            "judging": self._judging(),
            "compared_with": asdict(compared_with),
            "samples": [sample.to_dict() for sample in self.samples],
        }

    def _judging(self) -> dict[str, Any]:
        metrics = self.metrics()
        names = {
            "num_prompts": "num_judged_prompts",
            "num_missing": "num_missing_verdicts",
            "flip_rate": "flip_rate",
            "detectable_difference": "detectable_difference",
            "num_needed": "num_needed",
            "win": "num_wins",
            "tie": "num_ties",
            "loss": "num_losses",
        }
        values = {name: metrics.get(metric) for name, metric in names.items()}
        return {"judge": self.judge, "wanted_difference": self.wanted_difference, **values}
