"""The table of commands: a row each. The command line reads it here, as it reads the stages' own.

A command does at once what a person asks for, and leaves no manifest. Its file, of the same name, holds its function,
whose parameters are its options. Loads nothing that a command does its work with.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a command tells: a person reads the text, a program the values (`--json`)."""

    text: str
    values: Any
    """Plain JSON types."""


@dataclass(frozen=True)
class Command:
    """A command."""

    name: str
    """Also, with underscores, that of its module and function."""

    @property
    def function(self) -> Callable[..., Answer]:
        """The command's function; its module is loaded when this is asked for."""
        name = self.name.replace("-", "_")
        function: Callable[..., Answer] = getattr(importlib.import_module(f"dice_core.commands.{name}"), name)
        return function


COMMANDS: dict[str, Command] = {name: Command(name) for name in ("promote", "rollback", "history", "register", "push")}
