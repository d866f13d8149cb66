"""Everything that a run has left, read in one pass: a listing, then its manifests and reasons side by side.

What that means, the report shows, and stages/held_by_run.py compares.
"""

from dataclasses import dataclass, field

from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import MissingObjectError
from dice_core.storage.failures import StageFailure, failures_among
from dice_core.storage.manifest import Manifest, begun_stages, read_manifest
from dice_core.storage.transfers import side_by_side


@dataclass(frozen=True)
class RunContents:
    """What lies below a run."""

    uri: str
    keys: tuple[str, ...] = ()
    """Of all its files, relative to the run."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Of finished stages, by the place below the run, such as iteration-1/train."""
    begun: dict[str, Manifest] = field(default_factory=dict)
    """What stages began with that have not finished, as far as their parts say it."""
    failures: tuple[StageFailure, ...] = ()
    addresses: dict[str, str] = field(default_factory=dict)
    """Where results lie that are not at their place below the run."""

    def address(self, uri: str) -> str:
        """Return where the result lies whose place is at an address below the run."""
        return self.addresses.get(self._place(uri) or "", uri)

    def manifest(self, uri: str) -> Manifest | None:
        """Return the manifest at an address below the run, or at any other, which is then asked for."""
        place = self._place(uri)
        return read_manifest(uri) if place is None else self.manifests.get(place)

    def keys_below(self, uri: str) -> list[str]:
        """Return the keys below an address of the run, relative to it."""
        prefix = f"{self._place(uri)}/"
        return [key.removeprefix(prefix) for key in self.keys if key.startswith(prefix)]

    def _place(self, uri: str) -> str | None:
        below = layout.join(self.uri, "")
        return uri.removeprefix(below).rstrip("/") if uri.startswith(below) else None


def read_contents(run_uri: str) -> RunContents:
    """Read what a run has left; nothing where it has not begun.

    Raises:
        StorageError: the storage cannot be read, or a manifest is none.
    """
    storage = open_storage(run_uri)
    keys = tuple(found.key for found in storage.list())
    folders = [key.removesuffix(f"/{layout.MANIFEST}") for key in keys if key.endswith(f"/{layout.MANIFEST}")]
    places = [folder for folder in folders if layout.is_stage(folder)]

    def read(place: str) -> Manifest | None:
        try:
            key = f"{place}/{layout.MANIFEST}"
            return Manifest.from_json(storage.read_bytes(key), layout.join(run_uri, key))
        except MissingObjectError:
            # Deleted since the listing, to be made anew.
            return None

    found = zip(places, side_by_side(read, places), strict=True)
    manifests = {place: manifest for place, manifest in found if manifest}
    begun = begun_stages(run_uri, (key for key in keys if key.rpartition("/")[0] not in manifests))
    return RunContents(run_uri, keys, manifests, begun, tuple(failures_among(run_uri, keys)))
