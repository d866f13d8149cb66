"""The key of an endpoint: from a variable of the environment, and from nowhere else. Loads nothing.

A Kubernetes secret fills the variable in a pod. The key is part of no settings, manifest, message or log.
"""

import os

from dice_core.judges.settings import JudgeModelConfig
from dice_core.settings.base import ConfigError


def api_key(config: JudgeModelConfig, section: str) -> str:
    """Return the key of an endpoint; empty where it asks for none.

    Args:
        config: names the variable.
        section: of the settings, for messages.

    Raises:
        ConfigError: the endpoint has no address or no model, or the variable is not set.
    """
    for name in ("endpoint_url", "endpoint_model"):
        if not getattr(config, name):
            raise ConfigError(f"{section}.{name}: is empty, and an endpoint is to judge: say where it is and its model")
    variable = config.endpoint_key_variable
    if variable and not os.environ.get(variable):
        raise ConfigError(
            f"{section}.endpoint_key_variable: {variable} is not set here: fill it from a secret (cluster.env_secret "
            f"and cluster.env_secret_keys), or {section}.endpoint_key_variable= for a server that asks for no key"
        )
    return os.environ[variable].strip() if variable else ""
