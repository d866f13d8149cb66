"""Files of a model on the Hub, brought into the Hub's own cache, and how far that is.

The Hub's client draws bars for a terminal. How much has come is read from its cache instead: whatever way the bytes
take, and whatever an earlier attempt has left, they lie there. `sources.py` says which files, and explains errors.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.progress import Progress, doing

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

_MB = 1_000_000
_LOOK_SECONDS = 1.0


def download(source: str, names: Sequence[str], revision: str | None, *, is_offline: bool) -> Path:
    """Download files into the Hub's cache, and say how fast it goes and how long it still takes.

    Args:
        source: the model's id.
        names: of the files, or patterns; those in folders are left out.
        revision: branch, tag or commit.
        is_offline: take what is there, and ask nobody.

    Returns:
        The folder of the revision, named after its commit.

    Raises:
        what the Hub's client raises.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # a batch job's log has no cursor
    options: dict[str, Any] = {"revision": revision, "ignore_patterns": ["*/*"], "allow_patterns": list(names)}
    if is_offline:
        return Path(snapshot_download(source, local_files_only=True, **options))
    with doing(f"asking the Hub for {source}"):
        try:
            wanted = snapshot_download(source, dry_run=True, **options)
        # Said better by the download itself, which may do without an answer.
        except Exception:
            wanted = []
    with told(wanted, f"download of {source}"):
        return Path(snapshot_download(source, **options))


@contextmanager
def told(wanted: "Sequence[DryRunFileInfo]", what: str, look_seconds: float = _LOOK_SECONDS) -> Iterator[None]:
    """Log how much of some files has come while the block downloads them.

    Args:
        wanted: the files, in the order of no account.
        what: begins each line.
        look_seconds: between two looks at the cache.
    """
    start, ended = time.time(), threading.Event()
    num_all = sum(file.file_size or 0 for file in wanted)
    progress = Progress(what, "MB", tells_end=False)

    def look() -> None:
        while True:
            progress(min(_num_bytes(wanted, start), num_all) // _MB, num_all // _MB)
            if ended.wait(look_seconds):
                return

    thread = threading.Thread(target=look, daemon=True, name="dice-hub-download")
    with doing(what):
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _num_bytes(wanted: "Sequence[DryRunFileInfo]", start: float) -> int:
    """Return how much of some files lies in the cache; what a killed attempt left of a file is begun anew."""
    whole = [file for file in wanted if Path(file.local_path).exists()]
    # REPOSITORY/snapshots/COMMIT/FILE is a link to REPOSITORY/blobs/DIGEST, which has another name until it is whole.
    blobs = {Path(file.local_path).parents[2] / "blobs" for file in wanted}
    unfinished = 0
    for path in (path for folder in blobs for path in folder.glob("*.incomplete")):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        if found.st_mtime >= start:
            # Written in several places at once: a file may have its size before its content.
            unfinished += min(found.st_size, found.st_blocks * 512)
    return sum(file.file_size or 0 for file in whole) + unfinished
