"""TensorBoard: one event file beside a training's result, in storage, which grows as training goes.

A training that goes on from a checkpoint writes the file anew, from the lines that the checkpoint kept: what an attempt
measured that was lost is gone from the curves too, and they stay equal to metrics.jsonl.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import MissingObjectError, StorageError
from dice_core.tracking.event_file import Event, event_record, first_record, read_events
from dice_core.tracking.feed import Line, Status, TrackerError

FOLDER, EVENTS_FILE = "tensorboard", "events.out.tfevents.dice"
"""Below the place of a training. TensorBoard knows its files by `tfevents` in their names."""


class TensorBoardFile:
    """The event file of one training. See Tracker."""

    seconds = 15.0

    def __init__(self, output_uri: str, folder: Path) -> None:
        """Take the training's place, and a folder of this machine for the file."""
        self.title = "tensorboard"
        self._uri, self._path = layout.join(output_uri, FOLDER), folder / EVENTS_FILE
        self._times: dict[int, float] = {}
        self._last: Line | None = None

    def begin(self) -> None:
        """Begin a new file; when the steps of an earlier attempt were made is taken from the one in storage."""
        try:
            stored = open_storage(self._uri).read_bytes(EVENTS_FILE)
            self._times = {event.step: event.time for event in read_events(stored)}
        except MissingObjectError:
            pass
        except ValueError:
            # Not one of ours: it is written over, and its times are those of now.
            pass
        except StorageError as error:
            raise TrackerError(str(error)) from None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(b"")

    def send(self, lines: Sequence[Line]) -> None:
        """Append lines, and copy the file to storage."""
        # After a copy that failed the same lines come again, and are in the file already.
        num_written = next((i + 1 for i, line in enumerate(lines) if line is self._last), 0)
        with self._path.open("ab") as stream:
            for line in lines[num_written:]:
                time = self._times.get(line.step, line.time)
                if not stream.tell():
                    stream.write(first_record(time))
                stream.write(event_record(Event(time, line.step, line.values)))
                self._last = line
        try:
            open_storage(self._uri).upload(self._path, EVENTS_FILE)
        except StorageError as error:
            raise TrackerError(str(error)) from None

    def end(self, status: Status, summary: Mapping[str, float]) -> None:
        """Add nothing: a curve has no end."""
