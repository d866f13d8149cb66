"""`dice <stage>` and `dice <command>`: every stage, as the images run it, and what else a person does with its results.

The options of either are the parameters of its function, with that function's docstring as their help; a stage's
settings are the sections of its row in the table of stages. There is no second list. Errors a person can mend are one
line and exit code 1.
"""

import argparse
import inspect
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dice_core import __version__, interrupts
from dice_core.commands import table as commands
from dice_core.commands.table import Command
from dice_core.progress import one_line
from dice_core.settings.base import ConfigError
from dice_core.settings.documentation import settings_help
from dice_core.settings.overrides import merge_overrides, parse_overrides
from dice_core.stages.table import SECTIONS, STAGES, Stage

COMMANDS: dict[str, Stage | Command] = {name: stage for name, stage in STAGES.items() if stage.is_command}
"""What the command line knows, by name: stages first."""
COMMANDS |= commands.COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage or command and print what it reports to standard output; return the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # One module is enough where its name comes first.
        named = [command for command in COMMANDS.values() if command.name in words[:1]]
        options = vars(build_parser(named or COMMANDS.values()).parse_args(words))
        command = COMMANDS[options.pop("command")]
        print(run_stage(command, options) if isinstance(command, Stage) else run_command(command, options))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        # A library may make another error of Ctrl-C: whoever called tells of that.
        if os.environ.get("DICE_DEBUG") or interrupts.is_pressed():
            raise
        print(f"dice: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def run_stage(stage: Stage, options: dict[str, Any]) -> str:
    """Call a stage's function with the parsed options; return its report as JSON."""
    values = chosen_settings(stage, options.pop("set"), options.pop("config"))
    report = stage.function(**options, **values)
    shown = {"uri": report.uri, "status": report.status, "message": report.message, "metrics": report.metrics}
    return json.dumps(shown, indent=1)


def run_command(command: Command, options: dict[str, Any]) -> str:
    """Call a command's function with the parsed options; return its answer for a person, or as JSON."""
    as_json = options.pop("json")
    answer = command.function(**options)
    return json.dumps(answer.values, indent=1) if as_json else answer.text


def chosen_settings(stage: Stage, overrides: Sequence[str], config: str | None) -> dict[str, dict[str, Any]]:
    """Return the settings of a stage by section, as far as a person has chosen them.

    Args:
        stage: its row of the table; sections of other stages are left out.
        overrides: of --set; they win.
        config: file of --config.

    Raises:
        ConfigError: a setting that is not there, or a file of another form.
    """
    settings = merge_overrides(_read_config(config), parse_overrides(overrides, stage.sections))
    return {name: value for name, value in settings.items() if name in stage.sections}


def build_parser(choices: Iterable[Stage | Command] = COMMANDS.values()) -> argparse.ArgumentParser:
    """Return the parser of some stages and commands, all by default."""
    parser = argparse.ArgumentParser(
        prog="dice",
        description="Run one stage of DICE, or a command on what stages have made. DICE_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"dice {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for choice in choices:
        summary, details = _documentation(choice.function)
        own = subparsers.add_parser(
            choice.name,
            help=summary,
            description=summary,
            epilog=_settings_help(choice) if isinstance(choice, Stage) else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sections = choice.sections if isinstance(choice, Stage) else ()
        parameters = inspect.signature(choice.function).parameters.values()
        for parameter in parameters:
            if parameter.name not in sections:
                _add_option(own, parameter, details.get(parameter.name, ""))
        if isinstance(choice, Stage):
            _add_settings(own, choice)
        else:
            own.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def _add_option(parser: argparse.ArgumentParser, parameter: inspect.Parameter, text: str) -> None:
    name, required = parameter.name, parameter.default is inspect.Parameter.empty
    option = "--" + re.sub(r"_(uri|uris|source)$", "", name).replace("_", "-")
    kind: dict[str, Any] = {"dest": name, "help": text, "required": required}
    if isinstance(parameter.default, bool):
        kind.update(action="store_true")
    elif name.endswith("_uris"):
        kind.update(action="extend", nargs="+", default=[], metavar="URI")
    else:
        numbers = (number for number in (int, float) if number in (type(parameter.default), parameter.annotation))
        value_type = next(numbers, str)
        metavar = "N" if value_type is not str else "URI" if name.endswith(("_uri", "_source")) else "TEXT"
        kind.update(type=value_type, default=None if required else parameter.default, metavar=metavar)
    parser.add_argument(option, **kind)


def _add_settings(parser: argparse.ArgumentParser, stage: Stage) -> None:
    allowed = f"sections here: {', '.join(stage.sections)}" if stage.sections else "this stage has none"
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="SECTION.FIELD=VALUE", help=f"settings; {allowed}"
    )
    parser.add_argument("--config", metavar="FILE", help="JSON file with one object per section; --set wins")


def _settings_help(stage: Stage) -> str:
    if not stage.sections:
        return ""
    title = "settings, with their defaults, for --set and --config:\n"
    # argparse formats the epilog.
    return title + settings_help(stage.sections).replace("%", "%%")


def _documentation(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the summary line of a Google docstring, and the text of each of its Args."""
    text = inspect.getdoc(function) or ""
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE)
    return text.split("\n")[0], {name: re.sub(r"\s+", " ", value).replace("%", "%%") for name, value in entries}


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        # Editors of Windows begin a file with a mark.
        values = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise ConfigError(f'{path}: must hold one JSON object per section, such as {{"training": {{"beta": 0.1}}}}')
    for name in values:
        if name not in SECTIONS:
            raise ConfigError(f"{path}: unknown section {name!r}, allowed: {', '.join(SECTIONS)}")
    return values


def _without_repeats(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; one of two values for one name would be lost without a word."""
    values = dict(entries)
    if repeated := [name for name, count in Counter(name for name, _ in entries).items() if count > 1]:
        raise ValueError(f"{repeated[0]!r} stands there twice: keep one")
    return values


if __name__ == "__main__":
    with interrupts.told_in_one_line(interrupts.LINE.format("dice")):
        sys.exit(main())
