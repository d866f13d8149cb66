"""`--set training.learning_rate=1e-6 iterations=3`, into a preset.

A name with a dot is a setting of a stage; one without is a field of the preset itself. Everything is checked here, so
that a typo fails before anything is compiled or submitted.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dice_core.settings.base import ConfigError
from dice_core.settings.hints import allowed
from dice_core.settings.overrides import parse_overrides, with_field
from dice_core.stages.check_settings import check_settings
from dice_core.stages.judge_models import check_judge_models, endpoints_of
from dice_core.stages.table import SECTIONS
from pipelines.cluster.config import ClusterConfig
from pipelines.cluster.pools import NODE_KINDS, POOLS, TRAINER_MEMORY_ZERO2
from pipelines.cluster.training_pods import OWNERS, training_pods
from pipelines.presets import PRESETS, Preset

_OF_PODS = re.compile(r"\bpods\.(\w+)")
_LOWEST = {"iterations": 1, "num_shards": 1, "num_retries": 0, "seed": 0}


def find_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ConfigError: there is none; the nearest name is suggested.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: unknown name {name!r}, {allowed(name, PRESETS)}")
    return PRESETS[name]()


def apply_overrides(preset: Preset, assignments: Iterable[str]) -> Preset:
    """Return the preset with settings changed.

    Args:
        preset: to start from; it is not changed.
        assignments: `section.field=value` or `field=value`; of two for the same field the later wins.

    Raises:
        ConfigError: one line naming what is not of that form, unknown, or out of range, and what is allowed.
    """
    assignments = list(assignments)
    own = [text for text in assignments if "." not in text.partition("=")[0]]
    preset = _on_its_pool(preset, own)
    sections = preset.sections()
    values = _parse(preset, [text for text in assignments if text not in own])
    _give_memory(preset, values)
    changes: dict[str, Any] = {
        name: type(sections[name]).parse(sections[name].to_dict() | fields, name) for name, fields in values.items()
    }
    for text in own:
        name, value = _own_field(preset, text)
        changes[name] = value
    changed = dataclasses.replace(preset, **changes)
    _check(changed)
    return changed


def _on_its_pool(preset: Preset, own: Sequence[str]) -> Preset:
    """Return the preset with the section `cluster` of the pool that was asked for: settings of it come on top."""
    names = [value for name, _, value in (text.partition("=") for text in own) if name == "pool"]
    if not names:
        return preset
    if preset.cluster is None:
        raise ConfigError("pool: a run on this machine has no nodes to choose")
    if names[-1] not in POOLS:
        raise ConfigError(f"pool: unknown name {names[-1]!r}, {allowed(names[-1], POOLS)}")
    return dataclasses.replace(preset, pool=names[-1], cluster=POOLS[names[-1]]())


def _give_memory(preset: Preset, values: dict[str, dict[str, Any]]) -> None:
    """Ask for what ZeRO-2 needs where a person chose it and said nothing of memory."""
    is_zero2 = values.get("training", {}).get("deepspeed", preset.training.deepspeed) == "zero2"
    if is_zero2 and preset.pool in NODE_KINDS and "trainer_memory" not in values.get("cluster", {}):
        values.setdefault("cluster", {})["trainer_memory"] = TRAINER_MEMORY_ZERO2


def _parse(preset: Preset, assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    for name in (text.partition("=")[0] for text in assignments):
        if name.startswith("cluster.") and preset.cluster is None:
            raise ConfigError(f"{name}: a run on this machine has no section cluster")
    # A preset has no section for the training pods: section cluster decides what they look like.
    owners = {name: f"cluster.{owner}" for name, owner in OWNERS.items()} if preset.cluster else {}
    return parse_overrides(assignments, {name: type(value) for name, value in preset.sections().items()}, owners)


def _check(preset: Preset) -> None:
    """Check that the settings fit each other, those of the training pods too."""
    if preset.cluster is None and preset.launch.backend != "torchrun":
        raise ConfigError(
            f"launch.backend: a run on this machine trains with torchrun, got {preset.launch.backend!r}: make submit "
            "trains in pods of a cluster"
        )
    sections = {name: value for name, value in preset.sections().items() if name in SECTIONS}
    if pods := training_pods(preset.launch, preset.cluster):
        sections["pods"] = pods
    try:
        parsed = check_settings({name: value.to_dict() for name, value in sections.items()})
    except ConfigError as error:
        raise ConfigError(_OF_PODS.sub(_owner, str(error))) from None
    # Keys are in the pods of a run, and not on this machine.
    check_judge_models(parsed, preset.judge_source, preset.reward_source, needs_keys=False)
    if preset.cluster:
        for section, endpoint in endpoints_of(parsed, preset.reward_source).items():
            _check_key(section, endpoint.endpoint_key_variable, preset.cluster)


def _owner(found: re.Match[str]) -> str:
    """Return the setting that decides one of the training pods: nobody has typed that one."""
    return f"cluster.{OWNERS[found[1]]}" if found[1] in OWNERS else found[0]


def _check_key(section: str, variable: str, cluster: ClusterConfig) -> None:
    """Check that pods get an endpoint's key, from a secret; preflight looks whether the secret has it."""
    if variable in cluster.env:
        raise ConfigError(f"cluster.env: {variable} is a key: it belongs into a secret, see cluster.env_secret")
    if variable and (not cluster.env_secret or variable not in cluster.env_secret_keys):
        keys = json.dumps(list(dict.fromkeys([*cluster.env_secret_keys, variable])), separators=(",", ":"))
        raise ConfigError(
            f"{section}.endpoint_key_variable: pods do not get {variable}: name the secret that has it, with "
            f"cluster.env_secret={cluster.env_secret or 'NAME'} cluster.env_secret_keys={keys}"
        )


def _own_field(preset: Preset, text: str) -> tuple[str, str | int]:
    name, equals, word = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r}: must be NAME=VALUE, such as training.learning_rate=1e-6 or iterations=3")
    if name in preset.sections():
        example = next(iter(type(preset.sections()[name]).model_fields))
        raise ConfigError(f"{name}: is a section, name a field of it, such as {name}.{example}=...")
    if name not in preset.own_fields():
        known = [*preset.own_fields(), *preset.sections()]
        meant = with_field(name, {section: type(value) for section, value in preset.sections().items()})
        raise ConfigError(f"{name}: unknown setting, {allowed(name, known, meant)}")
    if isinstance(getattr(preset, name), str):
        return name, word
    if not word.removeprefix("-").isdecimal() or int(word) < _LOWEST[name]:
        raise ConfigError(f"{name}: must be a whole number from {_LOWEST[name]}, got {word!r}")
    return name, int(word)
