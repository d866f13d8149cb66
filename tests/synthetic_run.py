"""A run with numbers such as a real one has, for tests of what people read."""

import math
from typing import Any

import numpy as np

from dice_core.report.run_data import IterationData, RunData, StageData, histogram, merge_shards
from dice_core.storage import layout
from dice_core.storage.manifest import FileEntry, Manifest

ROOT = "s3://bucket/dice/runs/march"
POINTER = "s3://bucket/dice/promoted/zephyr.json"
FIRST_POLICY = "s3://bucket/dice/models/zephyr-7b-beta"
PLAN = {
    "preset": "zephyr",
    "policy_source": "HuggingFaceH4/zephyr-7b-beta",
    "preferences_source": "HuggingFaceH4/ultrafeedback_binarized",
    "prompts_source": "",
    "seed": 42,
    "training": {"beta": 0.1, "learning_rate": 5e-7},
    "pairing": {"replay_ratio": 0.5},
}


def stage(name: str, number: int, metrics: dict[str, Any], **settings: Any) -> StageData:
    uri = layout.stage(ROOT, number, name) if number else layout.warm_start(ROOT, name)
    files = {"part-00000.parquet": FileEntry(1, "ab" * 32, 1)}
    inputs = {"policy": f"s3://bucket/dice/models/smollm2-135m@{'cd' * 32}"}
    manifest = Manifest(
        stage=name,
        fingerprint="0123456789abcdef" * 4,
        files=files,
        settings=settings,
        inputs=inputs,
        metrics=metrics,
        ran_by={"runner": "pytorchjob", "num_nodes": 2} if name == "train" else {},
    )
    return merge_shards({uri: manifest}, 1)


def training_lines(steps: int, start_margin: float, rng: np.random.Generator) -> tuple[dict[str, Any], ...]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        margin = start_margin * (1 - math.exp(-3 * step / steps))
        seen = margin + rng.normal(0, 0.08)
        line = {"step": step, "loss": math.log1p(math.exp(-seen)), "rewards/chosen": seen * 0.4}
        line |= {"rewards/rejected": -seen * 0.6, "rewards/margins": seen}
        line |= {"rewards/accuracies": min(1, max(0, 0.5 + 0.6 * seen + rng.normal(0, 0.08))), "grad_norm": 12.5}
        lines.append(line)
        if step % max(steps // 8, 1) == 0:
            held = margin * 0.7
            lines.append(
                {"step": step, "eval_loss": math.log1p(math.exp(-held)), "eval_rewards/chosen": held * 0.3}
                | {"eval_rewards/rejected": -held * 0.7, "eval_rewards/margins": held}
                | {"eval_rewards/accuracies": 0.5 + 0.5 * held}
            )
    return tuple(lines)


REASONS = {
    "better": "win rate 54.3% (95% interval 51.3% to 57.3%), 53.1% at equal length (50.2% to 56.0%)",
    "not shown": "win rate 51.2% (95% interval 48.2% to 54.2%) is not shown to be above one half",
    "worse": "win rate 45.0% (95% interval 42.0% to 48.0%)",
}
_WIN_RATES = {"better": 0.543, "not shown": 0.512, "worse": 0.45}


def measured(name: str, value: float, half: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half, f"{name}_se": half / 1.96}


def evaluation_metrics(outcome: str = "better", judged: bool = True, growth: float = 0.0691) -> dict[str, Any]:
    """The numbers of evaluation.json, see dice_core/evaluation/result.py."""
    found: dict[str, Any] = {}
    if judged:
        found |= measured("win_rate", _WIN_RATES[outcome], 0.03)
        found |= measured("length_controlled_win_rate", _WIN_RATES[outcome] - 0.012, 0.029)
        found |= measured("reward_judge_agreement", 0.61, 0.03)
        found |= {"num_wins": 541, "num_ties": 31, "num_losses": 452, "sign_test_p": 0.005}
        found |= {"num_judged_prompts": 1024, "num_missing_verdicts": 3, "share_parsed_verdicts": 0.997}
        found |= {"flip_rate": 0.0, "num_same_answers": 2, "num_needed": 3300, "detectable_difference": 0.037}
    else:
        found |= {"num_needed": 431, "detectable_difference": 0.259}
    found |= measured("heldout_reward_accuracy", 0.664, 0.058)
    found |= measured("heldout_reward_accuracy_incumbent", 0.594, 0.06)
    found |= measured("heldout_reward_accuracy_previous", 0.594, 0.06)
    change = 0.07 if judged or outcome == "better" else 0.125
    found |= measured("heldout_reward_accuracy_change", change, 0.041 if outcome == "better" else 0.181)
    found |= measured("heldout_reward_margin", 4.21, 0.4) | measured("heldout_step_accuracy", 0.582, 0.0603)
    found |= measured("mean_response_characters", 1284.0, 172.0)
    found |= measured("mean_response_characters_incumbent", 1201.0, 178.0)
    found |= measured("response_characters_growth", growth, 0.061)
    found |= measured("share_cut_responses", 0.02, 0.01) | measured("share_cut_responses_incumbent", 0.01, 0.01)
    found |= {"drift_per_token": 0.042, "num_held_out_pairs": 256, "num_sample_prompts": 1024}
    return found


def _rule(
    metrics: dict[str, Any], name: str, measure: str, what: str, kind: str, bound: float, passed: bool | None
) -> dict[str, Any]:
    """A rule as evaluation/gate.py makes it."""
    interval = {"low": metrics.get(f"{measure}_low"), "high": metrics.get(f"{measure}_high")}
    return {"name": name, "what": what, "kind": kind, "value": metrics[measure], **interval} | {
        "bound": bound,
        "passed": passed,
        "sentence": f"{what} is {metrics[measure]:.3g}, the bound is {bound:g}",
    }


def evaluation(
    outcome: str = "better",
    samples: list[dict[str, Any]] | None = None,
    *,
    accepted: bool = True,
    judged: bool = True,
    number: int = 1,
    against: str = FIRST_POLICY,
) -> dict[str, Any]:
    metrics = evaluation_metrics(outcome, judged, growth=0.0691 if accepted else 0.82)
    gain = {"better": True, "not shown": None, "worse": False}[outcome]
    gains = [("accuracy_gain", "heldout_reward_accuracy_change", "change of held-out accuracy", 0.0)]
    if judged:
        names = {"win_rate": "win rate", "length_controlled_win_rate": "win rate at equal length"}
        gains = [(name, name, what, 0.5) for name, what in names.items()]
    rules = [_rule(metrics, *measure, "gain", bound, gain) for *measure, bound in gains]
    rules.append(
        _rule(metrics, "length_growth", "response_characters_growth", "growth in length", "guard", 0.5, accepted)
    )
    reason = REASONS[outcome] if accepted else "answers grew by 82.0%"
    gate = {"outcome": outcome, "accepted": accepted, "promotable": accepted and outcome == "better", "reason": reason}
    judging = {"judge": "reward-model" if judged else "none", "wanted_difference": 0.02 if judged else 0.05}
    return {
        "gate": {
            **gate,
            "warnings": ["the limit of tokens cuts 56% of the answers"] if accepted else [],
            "rules": rules,
        },
        "judging": {**judging, "num_needed": metrics["num_needed"], "flip_rate": metrics.get("flip_rate")},
        "compared_with": {
            "uri": against,
            "what": "first policy" if against == FIRST_POLICY else "promoted model",
            "promoted_uri": POINTER,
        },
        "samples": SAMPLES if samples is None else samples,
    }


def sample(prompt: str, incumbent: str, policy: str, **fields: Any) -> dict[str, Any]:
    rewards = fields.pop("rewards", (None, None))
    return {
        "prompt_id": f"id of {prompt[:40]}",
        "prompt": prompt,
        "incumbent": {"text": incumbent, "is_cut": False, "num_tokens": 40, "reward": rewards[0]},
        "policy": {"text": policy, "is_cut": True, "num_tokens": 50, "reward": rewards[1]},
        "verdict": None,
        **fields,
    }


def verdict(first: float, second: float) -> dict[str, Any]:
    flipped = (first - 0.5) * (second - 0.5) < 0
    both = {"candidate_first": first, "candidate_second": second}
    return {**both, "preference": (first + second) / 2, "flipped": flipped}


SAMPLES = [
    sample(
        "My landlord wants to raise the rent by 12 percent with two weeks' notice. What can I do?",
        "You can talk to your landlord and ask them. It is important to be polite. You can also look for help.",
        "First, check your lease and your local rules: many places ask for 30 to 60 days of written notice.\n\n"
        "1. Ask for the notice in writing.\n2. Compare the new rent with flats nearby.\n3. Offer a smaller rise.",
        verdict=verdict(0.91, 0.91),
        rewards=(-1.2, 3.4),
        category="advice",
    ),
    sample(
        "Write a two-line birthday wish for a colleague who loves hiking.",
        "Happy birthday! I hope you have a great day with hiking and friends and family.",
        "Happy birthday! May every trail ahead be dry,\nand every summit worth the climb.",
        verdict=verdict(0.8, 0.3),
        rewards=(0.5, 0.25),
        category="writing",
    ),
    sample(
        "Why do my basil leaves turn yellow?",
        "",
        "Most often it is too much water: let the top of the soil dry out.",
        verdict=verdict(0.12, 0.12),
        rewards=(-2.0, 4.0),
        category="advice",
    ),
]


def iteration(
    number: int,
    outcome: str = "better",
    *,
    accepted: bool = True,
    judged: bool = True,
    steps: int = 60,
    num_scores: int = 4000,
    against: str = FIRST_POLICY,
) -> IterationData:
    rng = np.random.default_rng(number)
    lengths = rng.lognormal(6.6, 0.5, num_scores)
    rewards = 0.004 * lengths + rng.normal(0, 4, num_scores) - 3
    order = np.argsort(rewards - 0.0231 * lengths / 10)
    worst, best = order[: num_scores // 16], order[-num_scores // 16 :]
    groups = {"all": rewards, "chosen": rewards[best], "rejected": rewards[worst]}
    penalties = np.linspace(-0.02, 0.08, 50)
    curve = tuple((float(p), float(1031 - 2200 * np.tanh(p * 22))) for p in penalties)
    dropped = {"num_dropped_length_limit": 61, "num_dropped_too_short": 3, "num_dropped_few_valid_responses": 48}
    dropped |= {"num_dropped_empty": 0}
    beta = {"training": {"beta": 0.1, "loss": "sigmoid", "learning_rate": 5e-7}}
    found = evaluation(outcome, accepted=accepted, judged=judged, number=number, against=against)
    numbers = evaluation_metrics(outcome, judged, growth=0.0691 if accepted else 0.82)
    numbers |= {key: found["gate"][key] for key in ("outcome", "reason")}
    numbers |= {key: int(found["gate"][key]) for key in ("accepted", "promotable")}
    numbers["promotion"] = "promoted" if found["gate"]["promotable"] else "not promoted: the gate does not say so"
    return IterationData(
        number,
        {
            "generate": stage(
                "generate",
                number,
                {"num_responses": 16384, "num_response_tokens": 5_000_000, "num_duplicate_responses": 212}
                | {"seconds": 1742.0, "num_gpus": 8},
                generation={"num_responses": 16, "temperature": 0.7, "top_p": 0.9},
            ),
            "score": stage("score", number, {"num_scored": 16272, **dropped, "reward_std": 4.1, "seconds": 380.5}),
            "pair": stage(
                "pair",
                number,
                {
                    "num_generated_pairs": 1009,
                    "num_replayed_pairs": 1009,
                    "num_train_pairs": 1906,
                    "num_eval_pairs": 112,
                    "num_unused_generated_pairs": 4812,
                    "num_tied_prompts": 3,
                    "num_few_responses_prompts": 11,
                    "num_non_finite_scores": 2,
                    "num_identical_pairs": 0,
                }
                | {"length_penalty": 0.0231, "length_gap": -0.8, "length_gap_unpenalised": 1031.4, "seconds": 4.2},
                pairing={"length_unit": "characters", "replay_ratio": 0.5},
            ),
            "train": stage(
                "train",
                number,
                {"first_loss": 0.6931, "last_loss": 0.5124, "first_reward_accuracy": 0.5, "last_reward_accuracy": 0.871}
                | {"num_measured_pairs": 512, "num_steps": steps, "tokens_per_second": 21000.0, "mfu": 0.412}
                | {"step0_loss": 0.693152, "reference_noise_rms": 0.0132, "relative_update": 1.2e-4}
                | {"update_rounding_loss": 0.31, "num_dropped_pairs": 2, "seconds": 5111.0, "num_gpus": 8}
                | {"peak_memory_bytes": 61 * 2**30},
                **beta,
            ),
            "evaluate": stage(
                "evaluate",
                number,
                {**numbers, "seconds": 141.0, "num_gpus": 1},
                evaluation={"num_shown_samples": 6},
                promoted_uri=POINTER,
            ),
        },
        histogram(groups),
        histogram({"all": lengths, "chosen": lengths[best], "rejected": lengths[worst]}),
        curve,
        training_lines(steps, 0.45, rng),
        found,
    )


def policy_of(number: int) -> str:
    return layout.stage(ROOT, number, "train")


def run_data(*iterations: IterationData, promoted: int = 0, **fields: Any) -> RunData:
    """Return a run. `promoted` is the iteration whose policy the pointer names; 0: it names nothing."""
    data = stage("data", 1, {"num_prompts": 1024, "num_held_out": 256, "num_dropped_duplicates": 12, "seconds": 3.0})
    pointer = {POINTER: policy_of(promoted) if promoted else ""}
    return RunData(ROOT, iterations, data, "2026-03-04 05:06 UTC", plan=PLAN, promoted=pointer, **fields)


def warm_start() -> IterationData:
    pair = stage("pair", 0, {"num_generated_pairs": 0, "num_replayed_pairs": 4200, "num_train_pairs": 4100})
    train = {"first_loss": 0.6931, "last_loss": 0.6012, "first_reward_accuracy": 0.5, "last_reward_accuracy": 0.77}
    rng = np.random.default_rng(9)
    settings = {"training": {"beta": 0.1}}
    stages = {"pair": pair, "train": stage("train", 0, {**train, "seconds": 812.0}, **settings)}
    return IterationData(0, stages, training=training_lines(40, 0.3, rng))
