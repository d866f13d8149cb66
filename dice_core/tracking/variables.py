"""The variables that trackers are configured with: MLflow's and W&B's own. Which are secret, and which travel."""

from collections.abc import Mapping

PREFIXES = ("MLFLOW_", "WANDB_")
SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY")
"""Never in the text of a pipeline or of a job, which more people read than a secret."""

PASSED_ON = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_WORKSPACE",
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
    "WANDB_MODE",
    "WANDB_PROJECT",
    "WANDB_TAGS",
)
"""What the launcher's environment says of trackers and training pods must know too. Kubeflow's MLflow plugin gives
tasks some of them. Nothing that is of the launcher's own pod: its run, its identity, its files."""


_ADDRESSES = ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL")


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an environment that training pods get too, as plain text.

    An address with a password in it is a secret.
    """
    hidden = _with_password(environment)
    return {name: environment[name] for name in PASSED_ON if environment.get(name) and name not in hidden}


def left_behind(environment: Mapping[str, str]) -> list[str]:
    """Return the variables of trackers that training pods would need and do not get, as they are secrets."""
    return [*(name for name in SECRETS if environment.get(name)), *_with_password(environment)]


def _with_password(environment: Mapping[str, str]) -> list[str]:
    return [name for name in _ADDRESSES if "@" in environment.get(name, "")]
