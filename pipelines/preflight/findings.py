"""What a check of preflight comes to: a line. What is checked is not known here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dice_core.launch.kubernetes import ForbiddenError, KubernetesError
from dice_core.storage.contract import StorageError
from pipelines.kfp.api import KfpError


class UncertainError(RuntimeError):
    """What was found may be right or wrong, or cannot be seen from here. The message is one line with what to do."""


@dataclass(frozen=True)
class Line:
    """The result of one check."""

    state: Literal["ok", "FAIL", "?"]
    what: str
    text: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.state:<5} {self.what}: {self.text}"


def checked(what: str, check: Callable[[], str]) -> Line:
    """Run a check that returns what it found, or raises what is wrong."""
    try:
        return Line("ok", what, check())
    except UncertainError as error:
        return Line("?", what, str(error))
    except ForbiddenError as error:
        return Line("?", what, f"you may not look: {error}")
    except (ValueError, KfpError, KubernetesError, StorageError) as error:
        return Line("FAIL", what, str(error))
