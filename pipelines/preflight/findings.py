"""The result of one preflight check: a line. The checks themselves are in the other files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dice_core.launch.kubernetes import ForbiddenError, KubernetesError
from dice_core.storage.contract import StorageError
from pipelines.kfp.api import KfpError


class UncertainError(RuntimeError):
    """A check cannot decide: the finding may be right or wrong, or is hidden from here. The message says what to do."""


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
    """Run a check, which returns what it found or raises what is wrong, and return its line."""
    try:
        return Line("ok", what, check())
    except UncertainError as error:
        return Line("?", what, str(error))
    except ForbiddenError as error:
        return Line("?", what, f"you may not look: {error}")
    except (ValueError, KfpError, KubernetesError, StorageError) as error:
        return Line("FAIL", what, str(error))
