"""Held-out prompts with the answers of every policy of a run, so that one can be followed; and the most disputed.

Pure. Sampling uses the same random numbers for a prompt in every iteration (evaluation/result.py has the form).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dice_core.report.judged import dispute, most_disputed
from dice_core.report.run_data import IterationData

_NUM_DISPUTED = 3

Prompt = dict[str, Any]
"""`prompt_id`, `prompt`, `answers` in the order of the policies, and of a disputed one `dispute`."""


def followed_prompts(iterations: Sequence[IterationData]) -> list[Prompt]:
    """Return the first held-out prompts, as many as the settings say, each with the answers of all policies."""
    evaluated = [iteration for iteration in iterations if iteration.evaluation]
    if not evaluated:
        return []
    found: dict[str, Prompt] = {}
    seen: set[str] = set()
    for iteration in evaluated:
        evaluation = iteration.evaluation or {}
        incumbent = str(evaluation["compared_with"].get("uri"))
        policy = next(iter(iteration.stage("train").manifests), f"iteration {iteration.number}")
        for sample in evaluation["samples"]:
            prompt = found.setdefault(
                _id(sample), {"prompt_id": _id(sample), "prompt": sample["prompt"], "answers": []}
            )
            if incumbent not in seen:
                prompt["answers"].append(_answer(_incumbent_name(iteration), sample["incumbent"]))
            prompt["answers"].append(_answer(f"iteration {iteration.number}", sample["policy"]) | _verdict(sample))
        seen |= {incumbent, policy}
    wanted = evaluated[-1].stage("evaluate").settings.get("evaluation", {}).get("num_shown_samples", len(found))
    return list(found.values())[:wanted]


def disputed_prompts(iterations: Sequence[IterationData]) -> list[Prompt]:
    """Return the prompts of the last evaluation on which judge and reward, or the judge and itself, disagree most."""
    evaluated = [iteration for iteration in iterations if iteration.evaluation]
    if not evaluated:
        return []
    last = evaluated[-1]
    return [
        {
            "prompt_id": _id(sample),
            "prompt": sample["prompt"],
            "dispute": dispute(sample),
            "answers": [
                _answer(_incumbent_name(last), sample["incumbent"]),
                _answer(f"iteration {last.number}", sample["policy"]) | _verdict(sample),
            ],
        }
        for sample in most_disputed((last.evaluation or {})["samples"], _NUM_DISPUTED)
    ]


def without_texts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the numbers of prompts and answers, for the summary."""
    return [
        {name: value for name, value in prompt.items() if name not in ("prompt", "answers")}
        | {"answers": [{name: value for name, value in one.items() if name != "text"} for one in prompt["answers"]]}
        for prompt in prompts
    ]


def _id(sample: Mapping[str, Any]) -> str:
    return str(sample.get("prompt_id") or sample["prompt"])


def _incumbent_name(iteration: IterationData) -> str:
    return str((iteration.evaluation or {})["compared_with"].get("what", "incumbent"))


def _answer(policy: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "policy": policy,
        "text": answer["text"],
        "num_characters": len(answer["text"]),
        "num_tokens": answer.get("num_tokens"),
        "is_cut": bool(answer.get("is_cut")),
        "reward": answer.get("reward"),
    }


def _verdict(sample: Mapping[str, Any]) -> dict[str, Any]:
    verdict = sample.get("verdict") or {}
    return {name: verdict.get(name) for name in ("preference", "candidate_first", "candidate_second")}
