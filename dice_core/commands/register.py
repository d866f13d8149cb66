"""Command register: the model registry says what the pointer says, after an outage or for the first time."""

from dataclasses import asdict

from dice_core.commands.table import Answer
from dice_core.release.mlflow_registry import register as follow
from dice_core.settings.base import ConfigError


def register(pointer_uri: str) -> Answer:
    """Make MLflow's model registry say what a pointer says: aliases champion and challenger; nothing is copied.

    Args:
        pointer_uri: the pointer, ROOT/promoted/NAME.json.
    """
    registered = follow(pointer_uri)
    if registered is None:
        raise ConfigError("MLFLOW_TRACKING_URI: is not set, so that there is no model registry: http://host:port")
    return Answer(str(registered), asdict(registered))
