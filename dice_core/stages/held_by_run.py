"""What a run holds already, compared with what it is now started with.

Each stage refuses other settings at its own place, which for the last one comes after hours. Here the manifests of all
stages are compared in one pass, by the fingerprints that the stages will compare (identity.py), before anything runs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dice_core import __version__
from dice_core.settings.base import Settings
from dice_core.stages.identity import Difference, differences, fingerprint
from dice_core.stages.prepare_data import SOURCES, local_sources
from dice_core.stages.table import (
    EVALUATE,
    GENERATE,
    PAIR,
    PREPARE_DATA,
    SCORE,
    STAGES,
    TRAIN,
    WARM_START_TRAINING,
    Stage,
    is_of_pipeline,
)
from dice_core.storage import layout
from dice_core.storage.manifest import Manifest
from dice_core.storage.run_contents import RunContents


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run is started with."""

    root: str
    run: str
    sections: Mapping[str, Settings]
    """All sections; `warm_start_training` is there where there is a warm start."""
    num_iterations: int
    num_shards: int
    seed: int
    promote_as: str
    policy_source: str
    reference_source: str
    """Empty with a warm start, whose reference is the policy of the source."""
    preferences_source: str
    prompts_source: str
    exclude_source: str
    judge_source: str = ""
    """Of the model that compares answers; empty: there is none."""
    reward_source: str = ""
    """Of the model that ranks responses; empty: there is none."""
    preset: str = ""
    """Its name, for people."""
    gpu_hour_price: float = 0.0
    """Of one GPU, in any currency, for the report; 0: not known."""

    @property
    def uri(self) -> str:
        """Where the run is."""
        return layout.run(self.root, self.run)

    @property
    def has_warm_start(self) -> bool:
        """Whether the run makes its first policy itself."""
        return not self.reference_source

    def sources(self) -> dict[str, str]:
        """Return the sources of data by the name that prepare-data has for each; those that are empty are left out."""
        named = {"preferences": self.preferences_source, "prompts": self.prompts_source, "exclude": self.exclude_source}
        return {name: source for name, source in named.items() if source}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON types, for the record."""
        others = {name: value for name, value in vars(self).items() if name not in ("root", "run", "sections")}
        return {**others, **{name: section.to_dict() for name, section in self.sections.items()}}


def find_differences(plan: RunPlan, held: RunContents) -> dict[str, list[Difference]]:
    """Return what keeps a plan from going on with what its run holds: place of a stage to what differs.

    What the run would make anew or never ask for, such as shards of another number of them, does not count.
    """
    manifest_at = cache(held.manifest)
    # A stage that was interrupted goes on with its parts, if they were made with the same settings.
    made = held.begun | held.manifests
    stages = [_Held(place, STAGES[found.stage], found) for place, found in made.items() if found.stage in STAGES]
    wanted = [stage for stage in stages if _is_wanted(plan, stage)]
    found = {stage.place: [*_differing_inputs(plan, stage, manifest_at), *_differing(plan, stage)] for stage in wanted}
    return {place: different for place, different in found.items() if different}


def describe(found: Mapping[str, list[Difference]]) -> str:
    """Return all differences in one line, each once, with the stages that were made otherwise."""
    places: dict[str, list[str]] = {}
    for place, different in found.items():
        for difference in different:
            places.setdefault(str(difference), []).append(place)
    return "; ".join(f"{difference} ({_first(where)})" for difference, where in places.items())


def _first(places: list[str]) -> str:
    return places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else "")


class _Held(NamedTuple):
    """A finished stage of the run."""

    place: str
    stage: Stage
    manifest: Manifest

    @property
    def iteration(self) -> int | None:
        return layout.iteration_of(self.place)


def _is_wanted(plan: RunPlan, held: _Held) -> bool:
    """Return whether a run by this plan would go on with a result."""
    if not is_of_pipeline(held.stage.name):
        return False
    if held.iteration is None:
        return held.stage is PREPARE_DATA
    if held.stage.scope == "shard" and not held.place.endswith(f"-of-{plan.num_shards}"):
        return False
    return (held.iteration > 0 or plan.has_warm_start) and held.iteration <= plan.num_iterations


def _differing(plan: RunPlan, held: _Held) -> list[Difference]:
    """Return the settings that differ, if the stage would refuse them."""
    manifest = held.manifest
    sections, arguments = _sections(plan, held), _arguments(plan, held)
    digests = {name: value.rpartition("@")[2] for name, value in manifest.inputs.items()}
    if fingerprint(held.stage, sections, arguments, digests) == manifest.fingerprint:
        return []
    found = [_by_setting(plan, manifest, difference) for difference in differences(manifest, sections, arguments)]
    return found or [
        Difference("form of the result", f"of version {manifest.package_version}", f"of version {__version__}")
    ]


def _sections(plan: RunPlan, held: _Held) -> dict[str, Settings]:
    """Return the sections that a stage records, as they are now."""
    now = {name: plan.sections[name] for name in held.stage.sections if name in held.manifest.settings}
    if held.stage is TRAIN and held.iteration == 0:
        now["training"] = plan.sections[WARM_START_TRAINING]
    return now


def _arguments(plan: RunPlan, held: _Held) -> dict[str, Any]:
    """Return what else decides a stage's result, as it is now; its place decides the rest."""
    recorded = held.manifest.settings
    now = {name: value for name, value in recorded.items() if not isinstance(value, dict)}
    if "seed" in now:
        now["seed"] = plan.seed
    if held.stage is EVALUATE:
        now["promoted_uri"] = layout.promoted(plan.root, plan.promote_as) if plan.promote_as else ""
    if held.stage is PREPARE_DATA:
        sources = plan.sources()
        # At what has the same name as then, the stage itself looks in a moment.
        renamed = {name: where for name, where in sources.items() if recorded.get(SOURCES, {}).get(name) != where}
        with local_sources(renamed) as found:
            digests = {name: found[name].digest if name in found else now.get(name) for name in sources}
        now = {"seed": plan.seed, **digests}
    return now


def _by_setting(plan: RunPlan, manifest: Manifest, difference: Difference) -> Difference:
    """Return a difference of what a stage is given by the setting that decides it, and by what the user wrote there."""
    name = difference.name
    if name == "promoted_uri":
        return Difference("promote_as", Path(str(difference.then)).stem, plan.promote_as)
    if manifest.stage != PREPARE_DATA.name or name not in ("preferences", "prompts", "exclude"):
        return difference
    then = manifest.settings.get(SOURCES, {}).get(name, difference.then)
    return Difference(f"{name}_source", then or "", plan.sources().get(name, ""))


def _differing_inputs(
    plan: RunPlan, held: _Held, manifest_at: Callable[[str], Manifest | None]
) -> Iterator[Difference]:
    """Yield what a stage would not read now as it did then: models, another number of shards, what was made anew."""
    inputs = held.manifest.inputs
    num_shards = sum(name.startswith("scores/") for name in inputs)
    if held.stage is PAIR and held.iteration and num_shards != plan.num_shards:
        yield Difference("num_shards", num_shards, plan.num_shards)
    models = _models(plan, held)
    for name, recorded in inputs.items():
        then, _, digest = recorded.rpartition("@")
        setting, source, uri = models.get(name, (name, "", then))
        present = manifest_at(uri)
        if present and present.content_digest != digest:
            yield Difference(setting, f"{then} ({digest[:12]})", f"{source or uri} ({present.content_digest[:12]})")
        elif not present and then != uri:
            yield Difference(setting, then, source)


def _models(plan: RunPlan, held: _Held) -> dict[str, tuple[str, str, str]]:
    """Return the models that a stage reads and the settings choose: input to setting, its value, and the address."""
    imported = {
        name: (name, source, layout.imported_model(plan.root, source))
        for name, source in vars(plan).items()
        if name in ("policy_source", "reference_source", "judge_source", "reward_source") and source
    }
    policy = imported["policy_source"]
    trained = ("policy_source", "a warm start from it", layout.warm_start(plan.uri, TRAIN.name))
    first = trained if plan.has_warm_start else policy
    reference = policy if plan.has_warm_start else imported.get("reference_source", policy)
    stage, iteration = held.stage, held.iteration
    if not iteration:
        return {"policy": policy, "reference": policy}
    models = {"base_reference": reference, "first": first} if stage is EVALUATE else {}
    for role, reader in (("judge", EVALUATE), ("reward", SCORE)):
        if stage is reader and f"{role}_source" in imported:
            models[role] = imported[f"{role}_source"]
    # Training reads one only where training.reference is base.
    models |= {"reference": reference} if stage is TRAIN else {}
    if iteration == 1:
        models |= {"previous": first} if stage is EVALUATE else {}
        models |= {"policy": first} if stage in (GENERATE, SCORE, PAIR, TRAIN) else {}
        models |= {"reference": reference} if stage is SCORE else {}
    return models
