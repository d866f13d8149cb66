"""Where a model comes from: the models and the data behind it, as the manifests of their stages recorded them.

Reads manifests only. One that is gone, or was replaced since, ends the line there: what is known of it is its address
and the digest that it had.
"""

import re
from dataclasses import dataclass

from dice_core.storage.manifest import Manifest, read_manifest

_IMPORT = "import-model"
# Of a data set on the Hub, before a split and a revision; a file or a folder of one's own is told by what it has.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OF_FILES = (".jsonl", ".ndjson", ".json", ".gz", ".parquet", ".gguf")
_MOST_MODELS = 1000


@dataclass(frozen=True)
class Origin:
    """A result that a model was made from, with the content that it had then."""

    uri: str
    content_digest: str
    manifest: Manifest | None
    """None: it is gone, or another by now."""


@dataclass(frozen=True)
class Lineage:
    """What a model was made from."""

    models: tuple[Origin, ...]
    """The model itself, what it was trained from, and so on to one that was imported."""
    pairs: Origin | None
    """The pairs that it was trained on."""
    data: Origin | None
    """The data that its run prepared."""

    @property
    def base_model(self) -> str:
        """Hub id of the model that all began with; empty where that is not known."""
        first = self.models[-1].manifest
        # The commit is recorded of Hub models alone.
        is_of_hub = first is not None and first.stage == _IMPORT and "commit" in first.settings
        return str(first.settings["source"]) if first and is_of_hub else ""

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the data, as far as they come from the Hub."""
        sources = self.data.manifest.settings.get("sources", {}) if self.data and self.data.manifest else {}
        named = [str(sources[name]) for name in ("preferences", "prompts") if name in sources]
        return list(dict.fromkeys(found for source in named if (found := _hub_id(source))))


def read_lineage(uri: str, manifest: Manifest) -> Lineage:
    """Return what a model was made from.

    Args:
        uri: of the model.
        manifest: of the model.

    Raises:
        StorageError: the storage cannot be read, or a manifest is none.
    """
    models = [Origin(uri, manifest.content_digest, manifest)]
    while len(models) < _MOST_MODELS and (parent := _origin(models[-1], "policy")):
        models.append(parent)
    pairs = _origin(models[0], "pairs")
    return Lineage(tuple(models), pairs, _origin(pairs, "data") if pairs else None)


def _origin(made: Origin, name: str) -> Origin | None:
    """Return an input of a result, with its manifest if that still is the one that was read."""
    recorded = made.manifest.inputs.get(name, "") if made.manifest else ""
    if not recorded:
        return None
    uri, _, content_digest = recorded.rpartition("@")
    found = read_manifest(uri)
    return Origin(uri, content_digest, found if found and found.content_digest == content_digest else None)


def _hub_id(source: str) -> str:
    name = re.split("[:@]", source)[0]
    return name if _HUB_ID.fullmatch(name) and "://" not in source and not name.endswith(_OF_FILES) else ""
