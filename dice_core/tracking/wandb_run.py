"""W&B, through its own package and variables: one run for each training, in the group of its run.

transformers' own callback waits for W&B's server before the first step, for 90 seconds, and ends the training where
it does not answer. Here its package is spoken to by the thread of a feed.
"""

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dice_core.tracking.feed import Line, Status, TrackerError

DEFAULT_PROJECT = "dice"
_VARIABLES = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT")


def is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether W&B's variables ask for it."""
    is_off = environment.get("WANDB_MODE") == "disabled" or environment.get("WANDB_DISABLED", "").lower() in (
        "true",
        "1",
    )
    return not is_off and any(environment.get(name) for name in _VARIABLES)


class WandbRun:
    """The run of one training. See Tracker."""

    title, seconds = "wandb", 5.0

    def __init__(self, run: str, name: str, identity: str, config: Mapping[str, Any], folder: Path) -> None:
        """Take what W&B's pages call it.

        Args:
            run: of which it is a part; the group.
            name: of the training.
            identity: the same for an attempt and the next one, which goes on with its curves.
            config: settings, nested.
            folder: for the package's files, where WANDB_DIR names none.
        """
        self._names = {"group": run or None, "name": name}
        self._id, self._config, self._folder = hashlib.sha256(identity.encode()).hexdigest()[:16], config, folder
        self._run: Any = None

    def begin(self) -> None:
        """Start W&B's run, or go on with that of an earlier attempt."""
        if importlib.util.find_spec("wandb") is None:
            raise TrackerError(
                "its variables are set and its package is not installed (extra `wandb`): unset them, or build the "
                "train image with EXTRA_PACKAGES=wandb",
                is_final=True,
            )
        import wandb

        folder = os.environ.get("WANDB_DIR") or self._folder
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
                **self._names,
                id=self._id,
                resume="allow",
                job_type="train",
                config=dict(self._config),
                dir=str(folder),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.CommError as error:
            raise TrackerError(str(error).partition("\n")[0]) from None
        except wandb.errors.Error as error:
            raise TrackerError(str(error).partition("\n")[0], is_final=True) from None

    def send(self, lines: Sequence[Line]) -> None:
        """Store lines. W&B takes no step below the last one: what an earlier attempt stored stays."""
        for line in lines:
            self._run.log(dict(line.values), step=line.step)

    def end(self, status: Status, summary: Mapping[str, float]) -> None:
        """Finish the run."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
