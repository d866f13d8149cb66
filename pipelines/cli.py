"""`python -m pipelines COMMAND`: the commands of people and of the Makefile. Errors are one line and exit code 1.

A command is a function here that takes the parsed options; its parser is built beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dice_core import layout
from dice_core.config import ConfigError
from pipelines import cluster_cli
from pipelines.cluster_api import ClusterError
from pipelines.kfp_api import KfpError
from pipelines.local_run import LocalRunError, run_locally
from pipelines.overrides import apply_overrides, find_preset
from pipelines.presets import PRESETS, Preset


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ValueError, ClusterError, KfpError, LocalRunError, OSError) as error:
        print(f"pipelines: error: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m pipelines", description="Compile and run the DICE pipeline.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compile(commands)
    _add_run(commands)
    cluster_cli.add_commands(commands, add_preset_options, chosen_preset)
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
        help="change settings, such as training.learning_rate=1e-6 iterations=3",
    )


def chosen_preset(options: argparse.Namespace) -> Preset:
    """Return the preset that the options choose, with their changes."""
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
    preset = chosen_preset(options)
    run_name = layout.check_name(options.run or preset.name, "run")
    run_locally(preset, {"root": options.root, "run": run_name}, options.work_folder)
    return 0
