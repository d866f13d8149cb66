"""Whether a plan's stages fit, and the setting to change where one cannot: tried on the plan itself.

A change is proposed only if the stage fits with it. What takes more than 9 tenths of a device is close: the arithmetic
has assumptions of that size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dice_core.settings.base import ConfigError
from dice_core.settings.quantities import quantity
from dice_core.stages.table import EVALUATE, GENERATE_AND_SCORE, TRAIN
from pipelines.cluster.pools import NODE_KINDS
from pipelines.overrides import apply_overrides
from pipelines.planning import remedies
from pipelines.planning.memory import GIB
from pipelines.planning.remedies import Change
from pipelines.planning.run_plan import RunPlan, StagePlan
from pipelines.planning.text import duration
from pipelines.presets import Preset

CLOSE = 0.9
"""Of a device: what takes more may not fit."""

Plan = Callable[[Preset], RunPlan]

_MOST_CHANGES = 10
_TIMED = {"generate and score": GENERATE_AND_SCORE, "train": TRAIN, "evaluate": EVALUATE}


@dataclass(frozen=True)
class Misfit:
    """A stage that takes more of something than there is."""

    stage: str
    subject: str
    """What it is about whatever the settings: `states` of training, an engine, a pod."""
    what: str
    needed: float
    there: float
    of: str
    remedies: Sequence[Change]

    @property
    def is_close(self) -> bool:
        """Return whether it fits, and hardly."""
        return self.needed <= self.there

    def __str__(self) -> str:
        """Return what is lacking, in one line without the remedy."""
        needed, there = self.needed / GIB, self.there / GIB
        return f"{self.stage}: {self.what} needs {needed:,.0f} GiB of {self.of} and there are {there:,.0f}"


def misfits(plan: RunPlan, preset: Preset) -> list[Misfit]:
    """Return what does not fit, or hardly does: each subject of a kind of stage once."""
    found: dict[tuple[str, str], Misfit] = {}
    for stage in plan.stages:
        for misfit in _of_stage(stage, plan, preset):
            earlier = found.get(_key(misfit))
            if earlier is None or misfit.needed > earlier.needed:
                found[_key(misfit)] = misfit
    return list(found.values())


def _key(misfit: Misfit) -> tuple[str, str]:
    return misfit.stage.rpartition(": ")[2], misfit.subject


def _of_stage(stage: StagePlan, plan: RunPlan, preset: Preset) -> Iterator[Misfit]:
    is_training = stage.title.endswith("train")
    for use in stage.uses:
        total, subject = use.memory.total, use.what
        share, found = 1.0, iter(remedies.of_log_probs("evaluation" if use.what == "log-probs" else "scoring"))
        if use.what in ("vLLM", "the judge"):
            # They take what there is, and look first whether it is enough.
            section, engine = ("generation", preset.generation) if use.what == "vLLM" else ("judging", preset.judging)
            share, found = engine.gpu_memory_utilization, remedies.of_engine(section)
        elif is_training and use.what == "the reference":
            found = remedies.of_reference()
        elif is_training:
            subject, found = "states", remedies.of_training()
        there = plan.device_bytes * share
        if total > there * (CLOSE if is_training else 1.0001):
            yield Misfit(stage.title, subject, use.what, total, there, plan.device, list(found))
    if preset.cluster and stage.host_bytes:
        setting = _host_setting(stage)
        there = float(quantity(getattr(preset.cluster, setting)))
        node = NODE_KINDS.get(preset.pool)
        if is_training and preset.training.offload_optimizer != "none" and node:
            # Its pods ask for what offloaded states take (stages/train.py): the node must have it.
            there = max(there, node.memory_gib * remedies.OF_NODE * GIB)
        if stage.host_bytes > there:
            changes = list(remedies.of_pod(setting, stage.host_bytes, preset, is_training=is_training))
            yield Misfit(stage.title, "its pod", "its pod", stage.host_bytes, there, f"cluster.{setting}", changes)


def _host_setting(stage: StagePlan) -> str:
    kind = stage.title.rpartition(": ")[2]
    if kind == "train":
        return "trainer_memory"
    return "import_memory" if kind.startswith("import") else "gpu_task_memory"


def refusals(plan: RunPlan, preset: Preset, make_plan: Plan) -> list[str]:
    """Return a line for each thing that cannot fit, with the first change of settings that makes it fit.

    Args:
        plan: of the preset.
        preset: what was planned.
        make_plan: plans a changed preset.
    """
    return [
        f"{misfit}: {_advice(misfit, preset, make_plan)}" for misfit in misfits(plan, preset) if not misfit.is_close
    ]


def warnings(plan: RunPlan, preset: Preset) -> list[str]:
    """Return a line for each thing that is close."""
    return [f"{misfit}: close, it may not fit" for misfit in misfits(plan, preset) if misfit.is_close]


def late(plan: RunPlan, preset: Preset) -> list[str]:
    """Return a line for each kind of stage that may take longer than an attempt of it has."""
    found: dict[str, str] = {}
    for stage in plan.stages:
        kind = stage.title.rpartition(": ")[2]
        if preset.cluster is None or stage.seconds is None or kind not in _TIMED:
            continue
        timed, limit = _TIMED[kind], preset.cluster.timeout_seconds(_TIMED[kind])
        if stage.seconds.high > limit:
            names = " and ".join(f"cluster.{part}_timeout" for part in timed.parts or (timed.name,))
            text = f"may take {duration(stage.seconds.high)}, and an attempt ends after {duration(limit)} ({names})"
            found.setdefault(kind, f"{stage.title}: {text}")
    return list(found.values())


def all_changes(plan: RunPlan, preset: Preset, make_plan: Plan) -> list[str]:
    """Return settings with which everything fits: what is proposed for one lack after another.

    None: nothing lacks, or no change helps.
    """
    changes: list[str] = []
    for _ in range(_MOST_CHANGES):
        lacking = [misfit for misfit in misfits(plan, preset) if not misfit.is_close]
        if not lacking:
            # A later change of the same setting takes the place of an earlier one.
            return list({change.partition("=")[0]: change for change in changes}.values())
        remedy = _remedy(lacking[0], preset, make_plan)
        if not remedy:
            return []
        preset = apply_overrides(preset, remedy)
        plan, changes = make_plan(preset), [*changes, *remedy]
    return []


def _advice(misfit: Misfit, preset: Preset, make_plan: Plan) -> str:
    if remedy := _remedy(misfit, preset, make_plan):
        return f'SET="{" ".join(remedy)}"'
    otherwise = f"take a smaller model{remedies.OTHERWISE.get(misfit.subject, '')}"
    return f"no change of pool or settings that leaves results as they are makes it fit: {otherwise}"


def _remedy(misfit: Misfit, preset: Preset, make_plan: Plan) -> Change:
    """Return the first change with which a lack is gone; nothing: none of them helps."""
    for remedy in misfit.remedies:
        try:
            changed = apply_overrides(preset, remedy)
            left = misfits(make_plan(changed), changed)
        except ConfigError:
            continue
        if changed != preset and not any(_key(misfit) == _key(other) for other in left if not other.is_close):
            return remedy
    return ()
