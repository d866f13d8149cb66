"""The commands for runs on a cluster and their options: submit, status, logs, cancel, retry, preflight, schedules.

A command's module is loaded when it runs: kfp takes seconds, and `--help` needs none of it.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from pipelines.presets import Preset

Commands = Any
"""argparse's subparsers, whose type has no public name."""


def add_commands(
    commands: Commands,
    add_preset_options: Callable[[argparse.ArgumentParser], None],
    chosen_preset: Callable[[argparse.Namespace], Preset],
) -> None:
    """Add the commands.

    Args:
        commands: of the parser that gets them.
        add_preset_options: adds --preset and --set.
        chosen_preset: reads these.
    """

    def add(name: str, module: str, summary: str, *, preset: bool = False) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
        parser.add_argument(
            "--host",
            default="",
            metavar="URL",
            help="of Kubeflow Pipelines; KFP_HOST or http://localhost:8080 by default",
        )
        parser.add_argument("--namespace", default="", help="of the suite; DICE_NAMESPACE or kubeflow by default")
        parser.add_argument("--context", default="", metavar="NAME", help="of the kubeconfig; the current by default")
        if preset:
            add_preset_options(parser)
            parser.add_argument(
                "--root", default="", metavar="URI", help="of all runs; DICE_ROOT or the cluster's own by default"
            )

        def command(options: argparse.Namespace) -> int:
            function = getattr(importlib.import_module(f"pipelines.{module}"), name)
            return int(function(options, chosen_preset(options)) if preset else function(options))

        parser.set_defaults(command=command)
        return parser

    _add_submit(add("submit", "submit", "start a run on the cluster", preset=True))
    _add_schedule(add("schedule", "schedule", "start a run again and again", preset=True))
    parser = add("unschedule", "schedule", "delete a schedule; its runs go on")
    parser.add_argument("--name", required=True, help="of the schedule")
    parser = add("status", "runs", "show a run and its tasks, or the latest runs")
    parser.add_argument("--run", default="", metavar="NAME", help="of the run")
    parser = add("retry", "runs", "continue a run that failed or was stopped, with its own pipeline and settings")
    parser.add_argument("--run", required=True, metavar="NAME", help="of the run")
    parser.add_argument("--wait", action="store_true", help="follow the run and exit by its result")
    parser = add("cancel", "runs", "stop a run; retry continues it")
    parser.add_argument("--run", required=True, metavar="NAME", help="of the run")
    parser = add("logs", "logs", "show the logs of a run's pods")
    parser.add_argument("--run", required=True, metavar="NAME", help="of the run")
    parser.add_argument("--task", default="", metavar="STAGE", help="only this stage, such as train")
    parser.add_argument("--tail", default=100, type=int, metavar="N", help="last lines of each pod; 0: all")
    add("preflight", "preflight", "look whether the cluster has what a run needs", preset=True)


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", default="", metavar="NAME", help="of the run: an old one continues; a new one, with the time, if empty"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    parser.add_argument("--wait", action="store_true", help="follow the run and exit by its result")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="", help="of the schedule, replaced if it is there; the preset's by default")
    parser.add_argument("--cron", default="", metavar="FIELDS", help="six fields, seconds first, in UTC")
    parser.add_argument("--every", default="", metavar="TIME", help="such as 7d or 12h, from now on")
    parser.add_argument(
        "--prompts", default="", metavar="URI", help="s3://bucket/prefix/: each run takes the last by name below it"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
