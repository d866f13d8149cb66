"""`make plan`: what a run of a preset will take, before it is paid for; exit code 2 where a stage cannot fit."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from dice_core.settings.base import ConfigError
from dice_core.storage import layout
from pipelines.demo.precision import faster, settings_for
from pipelines.kfp.submit import chosen_root
from pipelines.overrides import apply_overrides, find_preset
from pipelines.planning.machine import MachineSpeed, measure_speed
from pipelines.planning.make import make_plan
from pipelines.planning.ranges import Range
from pipelines.planning.run_plan import RunPlan
from pipelines.planning.text import plan_lines
from pipelines.presets import Preset, on_this_machine

CANNOT_FIT = 2
"""The exit code of a plan whose run would fail."""


def plan(options: argparse.Namespace, preset: Preset) -> int:
    """Print what a run takes, and return 2 where a stage cannot fit."""
    if not 0 <= options.price < math.inf:
        raise ConfigError(f"price: must be 0 or more, got {options.price:g}")
    machine = measure_speed() if _is_on_cpu(preset) else None
    if machine:
        preset = as_run_here(preset, options.set, machine)
    made = make_plan(
        preset,
        machine,
        model_config=options.model_config,
        run_uri=layout.run(chosen_root(options.root), options.run) if options.run else "",
        response_tokens=_response_tokens(options.response_tokens),
    )
    price = options.price or (preset.cluster.gpu_hour_price if preset.cluster else 0.0)
    if options.json:
        print(json.dumps(to_json(made, price), indent=1))
    else:
        print("\n".join(plan_lines(made, price)))
    return CANNOT_FIT if made.refusals else 0


def _is_on_cpu(preset: Preset) -> bool:
    return preset.cluster is None or not preset.cluster.gpu_resource


def as_run_here(preset: Preset, assignments: Sequence[str], machine: MachineSpeed) -> Preset:
    """Return the preset as it runs on this machine; `make demo` chooses the precision by the same measurement."""
    if preset.name != "demo":
        return on_this_machine(preset)
    original = on_this_machine(find_preset(preset.name))
    return apply_overrides(original, [*settings_for(faster(machine.operations)), *assignments])


def _response_tokens(text: str) -> Range | None:
    """Return what --response-tokens says: a number, or two with a hyphen between them."""
    if not text:
        return None
    first, _, second = text.partition("-")
    try:
        low, high = float(first), float(second or first)
    except ValueError:
        low = high = math.nan
    if not 1 <= low <= high < math.inf:
        raise ConfigError(f"response-tokens: must be a number such as 340, or 250-400, 1 or more, got {text!r}")
    return Range(low, high)


def to_json(made: RunPlan, price: float = 0.0) -> dict[str, object]:
    """Return a plan as plain JSON types: bytes, seconds and tokens, each as a low and a high bound.

    Args:
        made: the plan.
        price: of a GPU for an hour; 0: not known, and neither is `cost`.
    """
    ranges = {name: getattr(made, name) for name in ("seconds", "gpu_seconds", "read_bytes", "written_bytes")}
    ranges["cost"] = made.gpu_seconds * (price / 3600) if made.gpu_seconds and price else None
    return {**asdict(made), **{name: None if value is None else asdict(value) for name, value in ranges.items()}}
