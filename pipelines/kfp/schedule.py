"""`make schedule` and `make unschedule`: recurring runs, each from the last promoted policy and on the newest prompts.

KFP cannot change a recurring run, so a new one replaces the old one of the same name. A recurring run has one run at a
time. It does not catch up on the ticks that it missed, except the newest, for which KFP starts one run at once.

Deleting a recurring run kills its run under way: its ScheduledWorkflow owns the workflow. These commands disable it
first, and delete it if it is idle. The next `make schedule` or `make unschedule` of the name deletes what is left.
"""

import argparse
import dataclasses
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from dice_core.settings.base import ConfigError
from dice_core.settings.durations import show_duration, to_seconds
from dice_core.stages import recurring_name as recurring
from dice_core.storage import layout
from pipelines.cluster.config import PIPELINE_ACCOUNT
from pipelines.kfp.api import Connection, KfpApi, KfpError
from pipelines.kfp.cancel import stop
from pipelines.kfp.cron import check_cron, next_start
from pipelines.kfp.names import short_name
from pipelines.kfp.submit import ACTIVE, check_images, chosen_root, prepare, require_fit, root_of_cluster, show, upload
from pipelines.presets import Preset

_JOB_ID = "0" * 32
_SHORTEST, _LONGEST = 3600, to_seconds("366d")
"""Of EVERY, in seconds."""


def schedule(options: argparse.Namespace, preset: Preset) -> int:
    """Create a recurring run, which replaces one of the same name."""
    name = check_schedule_name(options.name or preset.name)
    trigger = chosen_trigger(options.cron, options.every)
    require_fit(preset)
    preset = with_prompts(preset, options.prompts)
    root = chosen_root(options.root, partial(root_of_cluster, options))
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        submission = prepare(preset, name, root, Path(folder), recurring=True)
        if options.dry_run:
            print(f"schedule:        {name}, {show_trigger(trigger)}, one run at a time")
            print(show(submission, preset))
        check_images(preset)
        connection = Connection.from_environment(options.host, options.namespace)
        if options.dry_run:
            return 0
        api = KfpApi(connection)
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
    created, under_way, has_replaced = replace_schedule(api, api.experiment(submission.pipeline), name, settings)
    address = api.address("recurringrun", created.recurring_run_id)
    print(f"schedule {name}: {show_trigger(trigger)}{', replaced' if has_replaced else ''}: {address}")
    for run in under_way.values():
        print(
            f"run {run}: under way, of the replaced schedule, which stays until it has ended, disabled: the next make "
            "schedule or make unschedule of this name deletes it. The new schedule does not wait for the run; if they "
            f"must not overlap: make cancel RUN={shlex.quote(run)}",
            file=sys.stderr,
        )
    if not preset.prompts_source.endswith("/"):
        print("each run takes the same prompts: PROMPTS=s3://bucket/prefix/ gives each the newest file below it")
    return 0


def check_schedule_name(name: str) -> str:
    """Return the name of a schedule if the names of its runs, which begin with it, are valid.

    Raises:
        ConfigError: they are not.
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
    """Disable the recurring runs of a name, and delete those that have no run under way; --force ends these runs first.

    Raises:
        KfpError: there is none of the name, or a run under way keeps one from being deleted.
    """
    connection = Connection.from_environment(options.host, options.namespace)
    api = KfpApi(connection)
    # Without a name KFP would list, and this delete, the schedules of everybody.
    found = api.schedules(options.name) if options.name else []
    if not found:
        known = ", ".join(sorted({entry.display_name for entry in api.schedules("")})) or "none"
        fault = f"there is none called {options.name!r}" if options.name else "NAME= is needed, the name of a schedule"
        raise KfpError(f"schedule: {fault}; there are: {known}")
    under_way = retire(api, found)
    if under_way and not options.force:
        raise KfpError(
            f"schedule {options.name}: starts no more runs, but stays, disabled: deleting it would kill "
            f"{', '.join(under_way.values())}. When that has ended, make unschedule again; FORCE=1 ends it now"
        )
    if under_way:
        end_runs(api, under_way, partial(stop, api, context=options.context, namespace=connection.namespace))
        for entry in api.schedules(options.name):
            api.delete_schedule(entry.recurring_run_id)
    print(f"schedule {options.name}: deleted, with the pods and logs of its runs; what they made stays in S3")
    return 0


def replace_schedule(
    api: KfpApi, experiment_id: str, name: str, settings: dict[str, Any]
) -> tuple[Any, Mapping[str, str], bool]:
    """Create a recurring run, and retire those that had its name before.

    In this order: where the new one is refused, the old one stays.

    Returns:
        The new one, the runs under way of the old ones as of retire, and whether there were any old ones.
    """
    before = api.schedules(name)
    created = api.create_schedule(experiment_id, name, **settings)
    return created, retire(api, before), bool(before)


def retire(api: KfpApi, schedules: Sequence[Any]) -> dict[str, str]:
    """Disable recurring runs, and delete those that have no run under way.

    Returns:
        Runs under way, of the ones that are left disabled: id to the name that RUN= takes.
    """
    # Before looking for runs: a disabled one starts nothing in between.
    for entry in schedules:
        api.disable_schedule(entry.recurring_run_id)
    ids = {entry.recurring_run_id for entry in schedules}
    active = [run for run in api.all_runs() if run.recurring_run_id in ids and run.state in ACTIVE] if ids else []
    for identity in ids - {run.recurring_run_id for run in active}:
        api.delete_schedule(identity)
    return {str(run.run_id): short_name(api, run) for run in active}


def end_runs(
    api: KfpApi,
    under_way: Mapping[str, str],
    stop_run: Callable[[Any, str], object],
    *,
    patience: float = 120.0,
    pause: float = 5.0,
) -> None:
    """Stop runs and wait for their end: KFP never hears of the end of a run whose workflow is deleted before.

    Args:
        api: of the runs.
        under_way: as of retire.
        stop_run: takes a run and its name.
        patience: seconds to wait for all of them.
        pause: seconds between looks.
    """
    for run_id, name in under_way.items():
        stop_run(api.run(run_id), name)
    deadline, left = time.monotonic() + patience, dict(under_way)
    while left := {run_id: name for run_id, name in left.items() if api.run(run_id).state in ACTIVE}:
        if time.monotonic() > deadline:
            print(f"pipelines: not ended after {patience:.0f} s: {', '.join(left.values())}", file=sys.stderr)
            return
        time.sleep(pause)


def chosen_trigger(cron: str, every: str) -> dict[str, Any]:
    """Return when to start runs, as an argument of kfp.Client.create_recurring_run.

    Raises:
        ConfigError: both or neither is given, or the form is wrong.
    """
    if bool(cron) == bool(every):
        raise ConfigError("schedule: give either CRON='0 0 3 * * 1' (seconds first) or EVERY=7d")
    if cron:
        return {"cron_expression": check_cron(cron)}
    try:
        seconds = to_seconds(every)
    except ValueError as error:
        raise ConfigError(f"every: {error}") from None
    if seconds < _SHORTEST:
        raise ConfigError(f"every: must be an hour at least, a run takes longer than that, got {every!r}")
    if seconds > _LONGEST:
        raise ConfigError(f"every: must be a year (366d) at most, make submit starts a single run, got {every!r}")
    return {"interval_second": seconds}


def show_trigger(trigger: dict[str, Any]) -> str:
    """Return in words when runs start."""
    if "cron_expression" in trigger:
        cron = trigger["cron_expression"]
        first = next_start(cron, datetime.now(UTC))
        return f"at '{cron}' (seconds first; the cluster's time zone, UTC by default), first on {first:%Y-%m-%d %H:%M}"
    return f"every {show_duration(trigger['interval_second'])}"


def with_prompts(preset: Preset, prompts: str) -> Preset:
    """Return the preset with these prompts, if any are given."""
    if not prompts:
        return preset
    layout.check_s3(prompts, "prompts")
    return dataclasses.replace(preset, prompts_source=prompts)
