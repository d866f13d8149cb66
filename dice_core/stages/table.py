"""The table of stages: a row each. The command line, the runner, checks, pods, the report and the screen read it here.

A stage's row says what it is; its file, of the same name, holds its signature and its work. Loads no torch.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dice_core.data.settings import ChatConfig, DataConfig
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.judges.settings import GradingConfig, JudgingConfig
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.preferences.settings import PairingConfig, ScoringConfig
from dice_core.settings.base import Settings
from dice_core.settings.seeds import derive_seed
from dice_core.training.settings import TrainingConfig

Pod = Literal["cpu", "gpu", "import", "train"]
Scope = Literal["run", "iteration", "shard"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a run."""

    name: str
    """Of its folder in storage, its command, its component and, with underscores, its module and function."""
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What it reads, by name (a group such as `scores` has an input a shard), and the stages that make it."""
    sections: Mapping[str, type[Settings]] = field(default_factory=dict)
    """Its settings: parameters of its function."""
    pod: Pod = "cpu"
    """What its pod holds. That of train starts other pods and waits, or trains itself."""
    scope: Scope = "run"
    """It runs once in a run, in an iteration, or in a shard of an iteration."""
    loads_model: bool = True
    """Of a stage that tokenises: False, if it needs the tokenizer of a model alone (light_start.py)."""
    in_warm_start: bool = False
    """It also runs before iteration 1, where the run makes its first policy."""
    format_version: int = 1
    """Raised when its code gives other results for the same settings."""
    shown: tuple[str, ...] = ()
    """The metrics that tell a person most."""
    is_command: bool = True
    """It can be run from the command line. The others only answer a pipeline."""
    is_task: bool = True
    """It is a task of a pipeline, and has a component."""
    parts: tuple[str, ...] = ()
    """The stages that it runs one after the other in its pod, each at a place of its own; it has none itself."""

    def seed(self, run_seed: int, *iteration: int) -> int:
        """Return the seed of all its draws: its own, and in a stage of an iteration another one in each."""
        return derive_seed(run_seed, self.name, *iteration)

    @property
    def function(self) -> Callable[..., Any]:
        """The stage's function; its module is loaded when this is asked for."""
        name = self.name.replace("-", "_")
        function: Callable[..., Any] = getattr(importlib.import_module(f"dice_core.stages.{name}"), name)
        return function


_MODEL = ("import-model", "train", "extrapolate")
_RESPONSES = ("generate", "import-responses")

CHECK_SETTINGS = Stage(name="check-settings", is_command=False)
CHOOSE_INPUTS = Stage(name="choose-inputs", is_command=False)
IMPORT_MODEL = Stage(name="import-model", pod="import")
PREPARE_DATA = Stage(
    name="prepare-data",
    inputs={"policy": _MODEL},
    sections={"data": DataConfig, "chat": ChatConfig},
    loads_model=False,
    format_version=2,
    shown=("num_prompts", "num_preferences", "num_held_out"),
)
GENERATE = Stage(
    name="generate",
    inputs={"policy": _MODEL, "data": ("prepare-data",), "gate": ("evaluate",)},
    sections={"generation": GenerationConfig, "chat": ChatConfig},
    pod="gpu",
    scope="shard",
    format_version=2,
    shown=("num_prompts", "num_responses", "num_response_tokens"),
    is_task=False,
)
IMPORT_RESPONSES = Stage(
    name="import-responses",
    inputs={"policy": _MODEL, "data": ("prepare-data",)},
    sections={"data": DataConfig, "chat": ChatConfig},
    loads_model=False,
    shown=("num_prompts", "num_responses"),
    is_task=False,
)
SCORE = Stage(
    name="score",
    inputs={
        "policy": _MODEL,
        "reference": _MODEL,
        "responses": _RESPONSES,
        "reward": ("import-model",),
        "data": ("prepare-data",),
    },
    sections={"scoring": ScoringConfig, "grading": GradingConfig},
    pod="gpu",
    scope="shard",
    format_version=2,
    shown=("num_scored", "reward_mean", "reward_std"),
    is_task=False,
)
GENERATE_AND_SCORE = Stage(
    name="generate-and-score", pod="gpu", scope="shard", is_command=False, parts=(GENERATE.name, SCORE.name)
)
PAIR = Stage(
    name="pair",
    inputs={
        "data": ("prepare-data",),
        "policy": _MODEL,
        "scores": ("score",),
        "responses": _RESPONSES,
        "gate": ("evaluate",),
    },
    sections={"pairing": PairingConfig, "chat": ChatConfig},
    loads_model=False,
    scope="iteration",
    in_warm_start=True,
    format_version=2,
    shown=("num_generated_pairs", "num_replayed_pairs", "length_penalty", "length_gap"),
)
TRAIN = Stage(
    name="train",
    inputs={"policy": _MODEL, "pairs": ("pair",), "reference": _MODEL},
    sections={"training": TrainingConfig, "launch": LaunchConfig, "pods": PodConfig},
    pod="train",
    scope="iteration",
    in_warm_start=True,
    format_version=3,
    shown=("num_steps", "first_loss", "last_loss"),
)
EVALUATE = Stage(
    name="evaluate",
    inputs={
        "policy": _MODEL,
        "previous": _MODEL,
        "base_reference": _MODEL,
        "first": _MODEL,
        "incumbent": _MODEL,
        "data": ("prepare-data",),
        "judge": ("import-model",),
    },
    sections={
        "evaluation": EvaluationConfig,
        "judging": JudgingConfig,
        "generation": GenerationConfig,
        "chat": ChatConfig,
    },
    pod="gpu",
    scope="iteration",
    format_version=3,
    shown=("outcome", "win_rate", "heldout_reward_accuracy_incumbent", "heldout_reward_accuracy"),
)
ALPACA_EVAL = Stage(
    name="alpaca-eval",
    inputs={"policy": _MODEL},
    sections={"generation": GenerationConfig, "chat": ChatConfig},
    pod="gpu",
    scope="iteration",
    in_warm_start=True,
    shown=("num_prompts", "num_cut_answers", "mean_characters"),
    is_task=False,
)
ALPACA_SCORES = Stage(
    name="alpaca-scores",
    inputs={"answers": ("alpaca-eval",)},
    scope="iteration",
    in_warm_start=True,
    shown=("length_controlled_win_rate_percent", "win_rate_percent", "num_annotated"),
    is_task=False,
)
EXTRAPOLATE = Stage(
    name="extrapolate",
    inputs={"policy": _MODEL, "previous": _MODEL},
    shown=("relative_update", "update_rounding_loss"),
    is_task=False,
)
REPORT = Stage(name="report")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        CHECK_SETTINGS,
        CHOOSE_INPUTS,
        IMPORT_MODEL,
        PREPARE_DATA,
        GENERATE,
        IMPORT_RESPONSES,
        SCORE,
        GENERATE_AND_SCORE,
        PAIR,
        TRAIN,
        EVALUATE,
        ALPACA_EVAL,
        ALPACA_SCORES,
        EXTRAPOLATE,
        REPORT,
    )
}
"""All stages by name, in the order of a run, which the report keeps."""


def tasks_of(stage: str) -> list[str]:
    """Return the names of the tasks that run a stage: its own, which pipelines of older versions have, and others."""
    return [name for name, row in STAGES.items() if stage in (name, *row.parts)]


def is_of_pipeline(stage: str) -> bool:
    """Return whether a pipeline runs a stage, in a task of its own or as a part of one; a person runs the others."""
    return any(STAGES[name].is_task for name in tasks_of(stage))


WARM_START_TRAINING = "warm_start_training"
"""The section of the warm start's training; a run without a warm start has none."""

SECTIONS: dict[str, type[Settings]] = {
    name: kind for stage in STAGES.values() for name, kind in stage.sections.items()
} | {WARM_START_TRAINING: TrainingConfig}
"""The settings of all stages, by the name of the section."""
