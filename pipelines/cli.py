"""`python -m pipelines COMMAND`: the commands of people and of the Makefile. Errors are one line and exit code 1.

A command is a function here that takes the parsed options; its parser is built beside it.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dice_core import interrupts
from dice_core.launch.kubernetes import KubernetesError
from dice_core.settings.base import ConfigError
from dice_core.settings.documentation import settings_help
from dice_core.storage import layout
from pipelines.demo.local_run import LocalRunError, run_locally
from pipelines.kfp.api import KfpError
from pipelines.overrides import apply_overrides, find_preset
from pipelines.presets import PRESETS, Preset, on_this_machine

_SHOWS_ONLY = ("settings", "plan", "status", "logs")
_KILLED_BY_SIGPIPE = 141
"""The exit code of a program that a closed pipe ends, as shells tell it: whether a run succeeded was not said."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        code = int(options.command(options))
        # What is left is written here, where a reader that is gone is no error.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _without_reader(options.name_of_command)
    except (ValueError, KubernetesError, KfpError, LocalRunError, OSError) as error:
        if interrupts.is_pressed():
            raise
        print(f"pipelines: error: {error}", file=sys.stderr)
        return 1


def _without_reader(command: str) -> int:
    """Return the exit code of a command whose output nobody reads any more, as in `make logs | head`."""
    # Python writes what is left once more when it ends, and would tell that it cannot.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if command in _SHOWS_ONLY else _KILLED_BY_SIGPIPE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m pipelines", description="Compile and run the DICE pipeline.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name_of_command")
    _add_compile(commands)
    _add_run(commands)
    _add_settings(commands)
    _add_cluster_commands(commands)
    return parser


def add_preset_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a preset and change its settings, for every command that takes a preset."""
    parser.add_argument("--preset", default="zephyr", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="change settings, such as training.learning_rate=1e-6 iterations=3; `settings` lists them",
    )


def chosen_preset(options: argparse.Namespace) -> Preset:
    """Return the preset that the options choose, with their changes, for a run on a cluster."""
    return apply_overrides(find_preset(options.preset), options.set)


def _add_compile(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("compile", help="write the pipeline as YAML for Kubeflow Pipelines")
    add_preset_options(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="where to write (.yaml)")
    parser.add_argument("--recurring", action="store_true", help="the pipeline that make schedule sends")
    parser.set_defaults(command=_compile)


def _compile(options: argparse.Namespace) -> int:
    preset = chosen_preset(options)
    if options.output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"output: must end in .yaml or .yml, got {str(options.output)!r}")
    if not options.output.absolute().parent.is_dir():
        raise ConfigError(f"output: {options.output.absolute().parent} is not a folder")
    # Imported when it is needed: a typo is told without the second that kfp takes to load.
    from kfp import compiler

    from pipelines.dice import build_pipeline
    from pipelines.kfp.submit import check_images

    try:
        check_images(preset)
    except ConfigError as error:
        print(f"pipelines: warning: {error}", file=sys.stderr)
    compiler.Compiler().compile(build_pipeline(preset, recurring=options.recurring), str(options.output))
    print(f"{options.output}: {preset.description} ({options.output.stat().st_size >> 10} KiB)")
    return 0


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("run", help="run the pipeline on this machine, with kfp's local runner")
    add_preset_options(parser)
    parser.add_argument(
        "--root", required=True, metavar="URI", help="where the data go: s3://bucket/prefix or a folder"
    )
    parser.add_argument("--run", metavar="NAME", help="name of the run; the same name again continues it")
    parser.add_argument(
        "--work-folder", default="local_outputs", type=Path, metavar="FOLDER", help="for kfp's artifacts"
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    preset = apply_overrides(on_this_machine(find_preset(options.preset)), options.set)
    run_name = layout.check_name(options.run or preset.name, "run")
    run_locally(preset, {"root": options.root, "run": run_name}, options.work_folder)
    return 0


def _add_settings(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("settings", help="list the settings of a preset: values, types, meanings")
    add_preset_options(parser)
    parser.set_defaults(command=_settings)


def _settings(options: argparse.Namespace) -> int:
    preset = chosen_preset(options)
    for name in preset.own_fields():
        print(f"  {name}={getattr(preset, name)}")
    print(settings_help(preset.sections()))
    return 0


def _add_cluster_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands for runs on a cluster. A command's module is loaded when it runs: kfp takes seconds."""

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

    _add_submit(add("submit", "kfp.submit", "start a run on the cluster", preset=True))
    _add_schedule(add("schedule", "kfp.schedule", "start a run again and again", preset=True))
    parser = add("unschedule", "kfp.schedule", "disable a schedule; delete it when it has no run under way")
    parser.add_argument("--name", required=True, help="of the schedule")
    parser.add_argument("--force", action="store_true", help="end the run under way, and delete the schedule now")
    parser = add("status", "kfp.status", "show a run and its tasks, or the latest runs")
    parser.add_argument("--run", default="", metavar="NAME", help="of the run")
    parser = add("retry", "kfp.retry", "continue a run that failed or was stopped, with its own pipeline and settings")
    parser.add_argument("--run", required=True, metavar="NAME", help="of the run")
    parser.add_argument("--wait", action="store_true", help="follow the run and exit by its result")
    parser = add("cancel", "kfp.cancel", "stop a run; retry continues it")
    parser.add_argument("--run", required=True, metavar="NAME", help="of the run")
    parser = add("logs", "cluster.logs", "show the logs of a run's pods")
    parser.add_argument("--run", required=True, metavar="NAME", help="of the run")
    parser.add_argument("--task", default="", metavar="STAGE", help="only this stage, such as train")
    parser.add_argument("--tail", default=100, type=int, metavar="N", help="last lines of each pod; 0: all")
    parser.add_argument("--raw", action="store_true", help="with the lines of Kubeflow Pipelines and Argo")
    parser = add("board", "board", "serve the curves of a run's trainings, or of all runs, with TensorBoard")
    parser.add_argument("--run", default="", metavar="NAME", help="of the run; all runs if empty")
    parser.add_argument(
        "--root", default="", metavar="URI", help="of all runs; DICE_ROOT or the cluster's own by default"
    )
    parser.add_argument("--port", default=6006, type=int, metavar="N", help="of this machine, where it is served")
    parser.add_argument("--seconds", default=15, type=int, metavar="N", help="between two looks at the storage")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="the Python that has TensorBoard")
    parser.add_argument("--folder", default=".cache/board/curves", metavar="FOLDER", help="for copies of the curves")
    add("preflight", "preflight.preflight", "look whether the cluster has what a run needs", preset=True)
    _add_plan(add("plan", "planning.command", "tell what a run takes, before it is paid for", preset=True))


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", default="", metavar="NAME", help="of the run: an old one continues; a new one, with the time, if empty"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    parser.add_argument("--wait", action="store_true", help="follow the run and exit by its result")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--price", default=0.0, type=float, metavar="N", help="of a GPU for an hour, in any currency")
    parser.add_argument(
        "--model-config", default="", metavar="FILE", help="config.json of the policy, where its shape is not known"
    )
    parser.add_argument("--run", default="", metavar="NAME", help="of a run whose counts of data are taken")
    parser.add_argument(
        "--response-tokens", default="", metavar="N[-N]", help="mean length of a response, where it was measured"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="", help="of the schedule, replaced if it is there; the preset's by default")
    parser.add_argument("--cron", default="", metavar="FIELDS", help="six fields, seconds first, in UTC")
    parser.add_argument("--every", default="", metavar="TIME", help="such as 7d or 12h, from now on")
    parser.add_argument(
        "--prompts", default="", metavar="URI", help="s3://bucket/prefix/: each run takes the last by name below it"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
