"""DeepSpeed's checkpoints by way of the staging memory: its states are copied, and training goes on.

DeepSpeed decides what is in a state and which process saves what. Imports DeepSpeed.
"""

from typing import Any

import deepspeed.runtime.engine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from dice_core.training.checkpoints import CheckpointStore
from dice_core.training.staging import load_state


class StagedCheckpoints(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's interface to the store."""

    def __init__(self, store: CheckpointStore) -> None:
        """Take the run's store."""
        super().__init__()
        self._store = store

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin: nothing to do."""

    def save(self, state_dict: Any, path: str) -> None:
        """Copy a state in memory, to be written at the path."""
        self._store.stage_state(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return the state of a path."""
        return load_state(path, map_location or "cpu")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """End: the store marks a checkpoint complete when it is written."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """A tensor is copied as it is seen: DeepSpeed need not make copies of views first."""
        return False


def use_staged_checkpoints(store: CheckpointStore) -> None:
    """Have every engine that DeepSpeed makes from here on save to the store and load from it.

    Its settings can name its own kinds only, and a resumed engine loads before anybody gets hold of it.
    """
    deepspeed.runtime.engine.create_checkpoint_engine = lambda *_, **__: StagedCheckpoints(store)
