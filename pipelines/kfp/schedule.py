"""`make schedule` and `make unschedule`: recurring runs. Each starts from the last promoted policy, on newest prompts.

KFP has no call that changes a recurring run: one of the same name is deleted once the new one is there. It never runs
twice at a time and never catches up on what it missed. KFP counts the runs of each recurring run alone: one that the
replaced schedule started may go on beside the next, and is named.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from dice_core.settings.base import ConfigError
from dice_core.settings.durations import show_duration, to_seconds
from dice_core.stages import choose_inputs as recurring
from dice_core.storage import layout
from pipelines.cluster.config import PIPELINE_ACCOUNT
from pipelines.cluster.jobs import own_name
from pipelines.kfp.api import Connection, KfpApi, KfpError
from pipelines.kfp.cron import check_cron
from pipelines.kfp.submit import ACTIVE, check_images, chosen_root, prepare, root_of_cluster, show, upload
from pipelines.presets import Preset

_JOB_ID = "0" * 32
_SHORTEST_SECONDS = 3600


def schedule(options: argparse.Namespace, preset: Preset) -> int:
    """Create a recurring run, or replace the one of the same name."""
    name = check_schedule_name(options.name or preset.name)
    trigger = chosen_trigger(options.cron, options.every)
    preset = with_prompts(preset, options.prompts)
    root = chosen_root(options.root, partial(root_of_cluster, options))
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        submission = prepare(preset, name, root, Path(folder), recurring=True)
        if options.dry_run:
            print(f"schedule:        {name}, {show_trigger(trigger)}, one at a time, no catching up")
            print(show(submission))
            return 0
        check_images(preset)
        api = KfpApi(Connection.from_environment(options.host, options.namespace))
        version = upload(api, submission)
    settings = {
        **trigger,
        "version": version,
        "description": preset.description,
        "max_concurrency": 1,
        "no_catchup": True,
        "params": submission.parameters,
        "service_account": PIPELINE_ACCOUNT,
    }
    created, replaced = replace_schedule(api, api.experiment(submission.pipeline), name, settings)
    address = api.address("recurringrun", created.recurring_run_id)
    print(f"schedule {name}: {show_trigger(trigger)}{', replaced' if replaced else ''}: {address}")
    warn_of_runs(api, replaced)
    if not preset.prompts_source.endswith("/"):
        print("each run takes the same prompts: PROMPTS=s3://bucket/prefix/ gives each the newest file below it")
    return 0


def check_schedule_name(name: str) -> str:
    """Return the name if those of the runs that it starts can be made of it.

    Raises:
        ConfigError: they cannot.
    """
    layout.check_name(name, "name")
    try:
        recurring.run_name(name, _JOB_ID)
    except ValueError:
        num_added = len(recurring.run_name("x", _JOB_ID)) - len("x")
        raise ConfigError(
            f"name: a run is called by it and {num_added} characters more, {layout.MAX_NAME} at most: shorten it to "
            f"{layout.MAX_NAME - num_added}, got {len(name)}: {name!r}"
        ) from None
    return name


def unschedule(options: argparse.Namespace) -> int:
    """Delete the recurring runs of a name; the runs that they started go on."""
    api = KfpApi(Connection.from_environment(options.host, options.namespace))
    # Without a name KFP would list, and this delete, the schedules of everybody.
    found = api.schedules(options.name) if options.name else []
    if not found:
        known = ", ".join(sorted(entry.display_name for entry in api.schedules(""))) or "none"
        fault = f"there is none called {options.name!r}" if options.name else "NAME= is needed, the name of a schedule"
        raise KfpError(f"schedule: {fault}; there are: {known}")
    for entry in found:
        api.delete_schedule(entry.recurring_run_id)
    print(f"schedule {options.name}: deleted; a run that it started goes on until make cancel")
    return 0


def replace_schedule(
    api: KfpApi, experiment_id: str, name: str, settings: dict[str, Any]
) -> tuple[Any, frozenset[str]]:
    """Create a recurring run, delete those that had its name before; return it and the ids of these.

    In this order: where the new one is refused, the old one stays.
    """
    before = api.schedules(name)
    created = api.create_schedule(experiment_id, name, **settings)
    for entry in before:
        api.delete_schedule(entry.recurring_run_id)
    return created, frozenset(str(entry.recurring_run_id) for entry in before)


def warn_of_runs(api: KfpApi, schedule_ids: frozenset[str]) -> None:
    """Name the runs under way of schedules that are replaced: the new one does not wait for them."""
    if not schedule_ids:
        return
    for run in api.recurring_runs():
        if run.recurring_run_id in schedule_ids and run.state in ACTIVE:
            name = own_name(api.run(run.run_id)) or run.display_name
            print(
                f"run {name}: {run.state}, of the replaced schedule: the next run does not wait for it; if they must "
                f"not overlap: make cancel RUN={shlex.quote(name)} ({api.address('runs', run.run_id)})",
                file=sys.stderr,
            )


def chosen_trigger(cron: str, every: str) -> dict[str, Any]:
    """Return when to start runs, as kfp.Client.create_recurring_run has it.

    Raises:
        ConfigError: both or neither is given, or it is not of that form.
    """
    if bool(cron) == bool(every):
        raise ConfigError("schedule: give either CRON='0 0 3 * * 1' (seconds first) or EVERY=7d")
    if cron:
        return {"cron_expression": check_cron(cron)}
    try:
        seconds = to_seconds(every)
    except ValueError as error:
        raise ConfigError(f"every: {error}") from None
    if seconds < _SHORTEST_SECONDS:
        raise ConfigError(f"every: must be an hour at least, a run takes longer than that, got {every!r}")
    return {"interval_second": seconds}


def show_trigger(trigger: dict[str, Any]) -> str:
    """Return when runs start, for people."""
    if "cron_expression" in trigger:
        return f"at '{trigger['cron_expression']}' (seconds first; the cluster's time zone, UTC by default)"
    return f"every {show_duration(trigger['interval_second'])}"


def with_prompts(preset: Preset, prompts: str) -> Preset:
    """Return the preset with the place of its prompts changed, if one is given."""
    if not prompts:
        return preset
    layout.check_s3(prompts, "prompts")
    return dataclasses.replace(preset, prompts_source=prompts)
