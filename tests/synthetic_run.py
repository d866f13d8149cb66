"""A run with numbers such as a real one has, for tests of what people read."""

import math
from typing import Any

import numpy as np

from dice_core.report.run_data import IterationData, RunData, StageData, histogram, merge_shards
from dice_core.storage import layout
from dice_core.storage.manifest import FileEntry, Manifest

ROOT = "s3://bucket/dice/runs/march"


def stage(name: str, number: int, metrics: dict[str, Any], **settings: Any) -> StageData:
    uri = layout.stage(ROOT, number, name) if number else layout.warm_start(ROOT, name)
    files = {"part-00000.parquet": FileEntry(1, "ab" * 32, 1)}
    inputs = {"policy": f"s3://bucket/dice/models/smollm2-135m@{'cd' * 32}"}
    manifest = Manifest(
        stage=name, fingerprint="0123456789abcdef" * 4, files=files, settings=settings, inputs=inputs, metrics=metrics
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


GAIN = "accuracy 59.4% -> 66.4% (+7.0 +/- 2.1 points)"
NO_GAIN = "no gain: accuracy 87.5% -> 81.2% (-6.2 +/- 5.1 points)"


def evaluation(accepted: bool, samples: list[tuple[str, str, str]]) -> dict[str, Any]:
    reasons = [] if accepted else ["answers grew by 82.0% (standard error 9.0)"]
    gate = {"accepted": accepted, "improved": True, "comparison": GAIN, "reasons": reasons}
    warnings = ["the limit of tokens cuts 56% of the answers"] if accepted else []
    return {
        "gate": {**gate, "warnings": warnings},
        "samples": [
            {"prompt": prompt, "previous": {"text": old, "is_cut": False}, "policy": {"text": new, "is_cut": True}}
            for prompt, old, new in samples
        ],
    }


SAMPLES = [
    (
        "My landlord wants to raise the rent by 12 percent with two weeks' notice. What can I do?",
        "You can talk to your landlord and ask them. It is important to be polite. You can also look for help.",
        "First, check your lease and your local rules: many places ask for 30 to 60 days of written notice.\n\n"
        "1. Ask for the notice in writing.\n2. Compare the new rent with flats nearby.\n3. Offer a smaller rise.",
    ),
    (
        "Write a two-line birthday wish for a colleague who loves hiking.",
        "Happy birthday! I hope you have a great day with hiking and friends and family.",
        "Happy birthday! May every trail ahead be dry,\nand every summit worth the climb.",
    ),
    ("Why do my basil leaves turn yellow?", "", "Most often it is too much water: let the top of the soil dry out."),
]


def iteration(
    number: int, accepted: bool = True, steps: int = 60, num_scores: int = 4000, improved: bool = True
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
    beta = {"training": {"beta": 0.1, "loss": "sigmoid", "learning_rate": 5e-7}}
    measured = {"heldout_reward_accuracy": 0.664, "heldout_reward_accuracy_se": 0.0294}
    measured |= {"heldout_reward_accuracy_previous": 0.594, "heldout_reward_accuracy_previous_se": 0.0306}
    measured |= {"heldout_reward_accuracy_change": 0.07, "heldout_reward_accuracy_change_se": 0.021}
    measured |= {"heldout_reward_margin": 4.21, "heldout_reward_margin_previous": 2.9}
    measured |= {"heldout_step_accuracy": 0.582, "heldout_step_accuracy_se": 0.0308}
    measured |= {"mean_response_characters": 1284.0, "mean_response_characters_se": 88.0}
    measured |= {"mean_response_characters_previous": 1201.0, "mean_response_characters_previous_se": 91.0}
    measured |= {"response_characters_growth": 0.0691, "response_characters_growth_se": 0.031}
    measured |= {"accepted": int(accepted), "reason": GAIN if accepted else "answers grew by 82.0%"}
    measured |= {"improved": int(improved)} if improved else {"improved": 0, "reason": NO_GAIN}
    return IterationData(
        number,
        {
            "generate": stage(
                "generate",
                number,
                {"num_responses": 16384, "num_duplicate_responses": 212, "seconds": 1742.0},
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
                }
                | {"length_penalty": 0.0231, "length_gap": -0.8, "length_gap_unpenalised": 1031.4, "seconds": 4.2},
                pairing={"length_unit": "characters", "replay_ratio": 0.5},
            ),
            "train": stage(
                "train",
                number,
                {"first_loss": 0.6931, "last_loss": 0.5124, "first_reward_accuracy": 0.5, "last_reward_accuracy": 0.871}
                | {"step0_loss": 0.693152, "reference_noise_rms": 0.0132, "relative_update": 1.2e-4}
                | {"update_rounding_loss": 0.31, "num_dropped_pairs": 2, "seconds": 5111.0},
                **beta,
            ),
            "evaluate": stage("evaluate", number, {**measured, "seconds": 141.0}, evaluation={"num_shown_samples": 6}),
        },
        histogram(groups),
        histogram({"all": lengths, "chosen": lengths[best], "rejected": lengths[worst]}),
        curve,
        training_lines(steps, 0.45, rng),
        evaluation(accepted, SAMPLES),
    )


def run_data(*iterations: IterationData) -> RunData:
    data = stage("data", 1, {"num_prompts": 1024, "num_held_out": 256, "num_dropped_duplicates": 12, "seconds": 3.0})
    return RunData(ROOT, iterations, data, "2026-03-04 05:06 UTC")


def warm_start() -> IterationData:
    pair = stage("pair", 0, {"num_generated_pairs": 0, "num_replayed_pairs": 4200, "num_train_pairs": 4100})
    train = {"first_loss": 0.6931, "last_loss": 0.6012, "first_reward_accuracy": 0.5, "last_reward_accuracy": 0.77}
    rng = np.random.default_rng(9)
    settings = {"training": {"beta": 0.1}}
    stages = {"pair": pair, "train": stage("train", 0, {**train, "seconds": 812.0}, **settings)}
    return IterationData(0, stages, training=training_lines(40, 0.3, rng))
