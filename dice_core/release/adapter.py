"""A trained adapter on its way to the Hub, where the model that it belongs to must have a name that others know."""

import json
import tempfile
from pathlib import Path

from dice_core.models.files import ADAPTER_CONFIG
from dice_core.release.lineage import read_lineage
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, fetch_files


def adapter_config(uri: str, manifest: Manifest) -> dict[str, object]:
    """Return the config of the adapter beside a model, with the Hub's name of the model that it belongs to.

    Args:
        uri: of the trained model.
        manifest: of that model.

    Raises:
        UnfitError: there is no adapter, or it belongs to a model that did not come from the Hub.
    """
    if ADAPTER_CONFIG not in manifest.files:
        raise UnfitError(f"{uri}: has no adapter: it was trained with training.lora_rank 0; leave out --adapter")
    _, *before = read_lineage(uri, manifest).models
    base = before[0] if before else None
    settings = base.manifest.settings if base and base.manifest else {}
    # The commit is recorded of Hub models alone.
    if "commit" not in settings:
        raise UnfitError(
            f"{uri}: its adapter belongs to {base.uri if base else 'a model that is gone'}, which did not come from "
            "the Hub, so nobody there could use it: leave out --adapter, and the model with the adapter merged is sent"
        )
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        path = fetch_files(uri, manifest, Path(folder), [ADAPTER_CONFIG])[ADAPTER_CONFIG]
        config: dict[str, object] = json.loads(path.read_bytes())
    return {**config, "base_model_name_or_path": settings["source"], "revision": settings["commit"]}
