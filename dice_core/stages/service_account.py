"""Whether a pod runs as the service account that the suite's runs are meant to have.

"Clone run" in the UI of Kubeflow Pipelines drops it, and the namespace's default runs the tasks: perhaps without the
right to train in pods of their own, or without access to storage.
"""

import base64
import json
from pathlib import Path

from dice_core.launch.job_spec import GROUP, PLURAL
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.progress import log
from dice_core.settings.base import ConfigError

TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def own_account(token: Path = TOKEN) -> str:
    """Return the name of this pod's service account; empty where there is none, or its token does not say.

    The token names it in its claims, which are read and not verified: this is for a message.
    """
    try:
        claims = token.read_text().split(".")[1]
        subject = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return str(subject).rpartition(":")[2] if str(subject).startswith("system:serviceaccount:") else ""


def check_account(expected: str, *, trains_in_pods: bool, token: Path = TOKEN) -> None:
    """Warn where this pod has another account than the suite's; refuse what certainly cannot work with it.

    Args:
        expected: the suite's account; empty: any will do.
        trains_in_pods: the run needs the right to create training jobs.
        token: of this pod's account.

    Raises:
        ConfigError: this account may not create training jobs.
    """
    account = own_account(token)
    if not expected or account in ("", expected):
        return
    remedy = f"clone the run with service account {expected}, or use make submit"
    if trains_in_pods and _may_create_jobs() is False:
        raise ConfigError(f"service account {account}: may not create {PLURAL}, which training needs: {remedy}")
    log(
        f"check-settings: WARNING: this run has service account {account}, not {expected}, whose rights and access to "
        f"storage it may lack: if a task is denied something, {remedy}"
    )


def _may_create_jobs() -> bool | None:
    """Ask the cluster; None: it does not say."""
    try:
        return KubernetesApi().may("", "create", GROUP, PLURAL)
    except KubernetesError:
        return None
