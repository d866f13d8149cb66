"""The verdict on a whole run in one sentence: first policy to last, by what, promoted or not, and where the model is.

Pure: it reads what the gate decided of each iteration and decides nothing itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dice_core.report.numbers import fill, text_of

Summary = Mapping[str, Any]
"""Of an iteration."""

BETTER, NOT_SHOWN, WORSE = "better", "not shown", "worse"
UNFINISHED, FAILED = "unfinished", "failed"
_PLACES = ("promoted_uri", "policy_uri", "compared_with_uri")

_HEADS = {BETTER: "Better", NOT_SHOWN: "Not shown to be better", WORSE: "Worse"}
_MEASURED = (
    "wins {win_rate:.1%} of {num_judged_prompts:,} prompts "
    "(95% interval {win_rate_low:.1%} to {win_rate_high:.1%}), "
    "{length_controlled_win_rate:.1%} at equal length "
    "({length_controlled_win_rate_low:.1%} to {length_controlled_win_rate_high:.1%}), by judge {judging.judge}",
    "wins {win_rate:.1%} of {num_judged_prompts:,} prompts "
    "(95% interval {win_rate_low:.1%} to {win_rate_high:.1%}), by judge {judging.judge}",
    "moves implicit-reward accuracy on {num_held_out_pairs:,} held-out pairs from "
    "{heldout_reward_accuracy_incumbent:.1%} to {heldout_reward_accuracy:.1%}, "
    "by {heldout_reward_accuracy_change:+.1pt} points "
    "(95% interval {heldout_reward_accuracy_change_low:+.1pt} to {heldout_reward_accuracy_change_high:+.1pt})",
    "is {gate.outcome}: {reason}",
)
_NEEDED = (
    "{num_needed:,} {unit} would be needed to show a difference of {judging.wanted_difference:.3gpt} points, "
    "these show {detectable_difference:.3gpt} or more",
    "{num_needed:,} {unit} would be needed to show a difference of {judging.wanted_difference:.3gpt} points",
)


def run_verdict(iterations: Sequence[Summary], failures: Sequence[Any], promoted: Mapping[str, str]) -> dict[str, Any]:
    """Return the verdict: `outcome`, `sentence`, and what they are about.

    Args:
        iterations: of the summary, the warm start among them.
        failures: of the stages that belong to no iteration.
        promoted: pointers to the policy that each names now.
    """
    decided = [one for one in iterations if one["gate"]["outcome"]]
    failed = [line for one in iterations for line in one["failures"].items()] + [(line.task, "") for line in failures]
    if not decided:
        unknown = dict.fromkeys(("iteration", "accepted", "promotable", "promoted", *_PLACES))
        outcome = FAILED if failed else UNFINISHED
        return {"outcome": outcome, "sentence": _undecided(iterations, failed), **unknown}
    best = next((one for one in reversed(decided) if one["gate"].get("promotable")), decided[-1])
    said = [f"{_head(best)}: {_subject(best, decided)} {_by_what(best)}", *_later(best, decided)]
    return {
        "outcome": best["gate"]["outcome"],
        "sentence": f"{'; '.join([*said, _place(best, promoted)])}.",
        "iteration": best["iteration"],
        "accepted": bool(best["gate"].get("accepted")),
        "promotable": bool(best["gate"].get("promotable")),
        "promoted": _is_promoted(best, promoted),
        "promoted_uri": best["compared_with"].get("promoted_uri") or None,
        "policy_uri": best["policy_uri"],
        "compared_with_uri": best["compared_with"].get("uri"),
    }


def _undecided(iterations: Sequence[Summary], failed: Sequence[tuple[str, str]]) -> str:
    if failed:
        return f"No verdict: {failed[0][0]} failed."
    begun = [one for one in iterations if one["status"] not in ("not started", "completed")]
    where = f": {begun[0]['name']}, {begun[0]['status']}" if begun else ": nothing was measured"
    return f"No verdict yet{where}."


def _head(best: Summary) -> str:
    head = _HEADS.get(best["gate"]["outcome"], str(best["gate"]["outcome"]))
    return head if best["gate"].get("accepted") else f"{head}, and refused"


def _subject(best: Summary, decided: Sequence[Summary]) -> str:
    """Return who is compared with whom; an incumbent that this run has made is named by its iteration."""
    against = best["compared_with"]
    made = {one["policy_uri"]: one["name"] for one in decided if one["policy_uri"]}
    incumbent = made.get(against.get("uri"), f"the {against.get('what', 'policy before it')}")
    # A first policy and a promoted model of an earlier run are where the run began.
    chain = " (itself better than what the run started from)" if against.get("uri") in made else ""
    return f"{best['name']} against {incumbent}{chain}"


def _by_what(best: Summary) -> str:
    measured = text_of(fill(best, "", _MEASURED))
    if best["gate"]["outcome"] != NOT_SHOWN:
        broken = [rule["sentence"] for rule in best["gate"]["rules"] if rule.get("passed") is False]
        bars = f"; but {broken[0]}" if broken and best["gate"]["outcome"] == BETTER else ""
        return measured + bars
    unit = "prompts" if best.get("win_rate") is not None else "pairs"
    needed = fill({**best, "unit": unit}, "", _NEEDED)
    return f"{measured}; {text_of(needed)}" if len(needed) > 1 else measured


def _later(best: Summary, decided: Sequence[Summary]) -> list[str]:
    """Return what became of the iterations after the one that the verdict is about."""
    return [
        f"{one['name']} is {'refused' if not one['gate'].get('accepted') else one['gate']['outcome']}"
        + (" to be better still" if one["gate"]["outcome"] == NOT_SHOWN and one["gate"].get("accepted") else "")
        for one in decided
        if one["iteration"] > best["iteration"]
    ]


def _is_promoted(best: Summary, promoted: Mapping[str, str]) -> bool:
    """Return whether the pointer names the policy now, or, where it was not read, was moved to it."""
    pointer = best["compared_with"].get("promoted_uri")
    if pointer in promoted:
        return bool(promoted[pointer] == best["policy_uri"])
    return bool(best.get("promotion") == "promoted")


def _place(best: Summary, promoted: Mapping[str, str]) -> str:
    pointer, uri, became = best["compared_with"].get("promoted_uri"), best["policy_uri"], str(best.get("promotion"))
    if _is_promoted(best, promoted):
        return f"promoted, {pointer} names {uri}"
    where = f"the model is at {uri}"
    if became == "promoted":
        return f"promoted and replaced since, {pointer} names {promoted.get(pointer) or 'nothing'}, {where}"
    if became == "proposed":
        return f"proposed, and `dice promote` promotes it, {where}"
    if best["gate"].get("promotable"):
        return f"{became if became.startswith('not promoted') else 'not promoted'}, {where}"
    return f"not promoted, {where}"
