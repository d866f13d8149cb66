"""torch, hidden from transformers in a process that needs a tokenizer and no model.

transformers loads torch beside every tokenizer wherever it is installed: most of the seconds in which such a process
starts. The image `core` has none, and there as here the same classes make the same ids.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NAME = "torch"
_wanted: list[bool] = []


def hide_torch() -> None:
    """Let transformers find no torch from now on, in the whole of this process; for its main program to decide."""
    _wanted.append(True)


@contextmanager
def torch_hidden() -> Iterator[None]:
    """Surround the import of transformers, which looks once whether torch is there, and keeps the answer.

    Nothing happens in a process that has not called hide_torch, or has loaded torch.
    """
    if not _wanted or _NAME in sys.modules:
        yield
        return
    # importlib's own mark of a module that is not to be found. Not for longer: others ask for the name alone.
    sys.modules[_NAME] = None  # type: ignore[assignment]
    # Else transformers warns that it can load no model.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        yield
    finally:
        del sys.modules[_NAME]
