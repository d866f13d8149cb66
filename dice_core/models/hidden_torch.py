"""torch, hidden from the libraries of a process that needs a tokenizer and no model.

transformers loads torch beside every tokenizer wherever it is installed: most of the seconds in which such a process
starts. The image `core` has none, and there as here the same classes make the same ids.
"""

import os
import sys

_NAME = "torch"


def hide_torch() -> None:
    """Let torch be as if it were not installed, unless it is loaded already; of a whole process alone."""
    if _NAME not in sys.modules:
        # importlib's own mark of a module that is not to be found.
        sys.modules[_NAME] = None  # type: ignore[assignment]
        # Else transformers warns that it can load no model.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def reveal_torch() -> None:
    """Take it back: code inside a model may import what it likes."""
    if sys.modules.get(_NAME, sys) is None:
        del sys.modules[_NAME]
