"""Where the shape of a model comes from: a config.json that is given, the table, a folder, storage, or the Hub."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from dice_core.hub_access import is_hub_out_of_reach
from dice_core.models.files import CONFIG
from dice_core.settings.base import ConfigError
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from pipelines.planning.known_models import KNOWN_MODELS
from pipelines.planning.ranges import Range
from pipelines.planning.shapes import MODEL_CONFIG, ModelShape, shape_of

UNKNOWN_RESPONSES = (Range(200, 600), "assumed: how long this model's answers are is not known (RESPONSE_TOKENS=)")


class FoundModel(NamedTuple):
    """A shape, and how long the model's answers are."""

    shape: ModelShape
    source: str
    response_tokens: Range
    response_source: str


def find_model(name: str, config_path: str = "", *, asks_hub: bool = True) -> FoundModel:
    """Return what a model looks like.

    Args:
        name: a source of a preset: a name on the Hub, a folder, or an address on S3.
        config_path: of a config.json, or the folder with it; it counts first.
        asks_hub: whether to look there for a name that is not in the table.

    Raises:
        ConfigError: nothing here tells, and what to do.
    """
    known = KNOWN_MODELS.get(name.split("@")[0])
    responses = (known.response_tokens, known.response_source) if known else UNKNOWN_RESPONSES
    if config_path:
        return FoundModel(shape_of(_read(config_path), config_path), config_path, *responses)
    if known:
        return FoundModel(shape_of(known.config, name), f"{name}: {known.source}", *responses)
    if name.startswith("s3://") or Path(name).is_dir():
        return FoundModel(shape_of(_read(name), name), f"{name}/{CONFIG}", *responses)
    if not asks_hub:
        raise ConfigError(f"{name}: its shape is not in the plan's table")
    return FoundModel(shape_of(_of_hub(name), name), f"{name} on the Hub", *responses)


def _read(place: str) -> dict[str, Any]:
    """Read a config.json by its own path, or by that of its folder."""
    folder, _, name = place.rpartition("/") if place.endswith(".json") else (place.rstrip("/"), "/", CONFIG)
    try:
        text = open_storage(folder or ".").read_bytes(name)
        config = json.loads(text)
    except (StorageError, OSError, ValueError) as error:
        raise ConfigError(f"{place}: no {CONFIG} can be read there ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{place}: is no {CONFIG} of a model")
    return config


def _of_hub(name: str) -> dict[str, Any]:
    if is_hub_out_of_reach():
        raise ConfigError(f"{name}: its shape is not in the plan's table, and the Hub does not answer: {MODEL_CONFIG}")
    from huggingface_hub import hf_hub_download

    try:
        config: dict[str, Any] = json.loads(Path(hf_hub_download(name, CONFIG)).read_text())
    # The client has a dozen kinds of errors, of names, rights and connections.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{name}: the Hub gives no {CONFIG} ({reason}): {MODEL_CONFIG}") from None
    return config
