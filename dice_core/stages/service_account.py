"""Whether a pod runs as the service account that the suite's runs are meant to have.

"Clone run" in the UI of Kubeflow Pipelines drops it, and the namespace's default runs the tasks: perhaps without the
right to train in pods of their own, or without access to storage.
"""

import base64
import json
from pathlib import Path

from dice_core.launch.job_kind import JobKind
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


def account_remedy(expected: str, token: Path = TOKEN) -> str:
    """Warn where this pod has another account than the suite's.

    Args:
        expected: the suite's account; empty: any will do.
        token: of this pod's account.

    Returns:
        What to do if the account lacks something; empty where it is the suite's, or not known.
    """
    account = own_account(token)
    if not expected or account in ("", expected):
        return ""
    remedy = (
        f"this run has service account {account}: clone it with service account {expected}, or use make submit RUN=..."
    )
    log(f"check-settings: WARNING: {account} may lack rights and access that {expected} has; {remedy}")
    return remedy


def require_right_to_train(kind: JobKind, remedy: str) -> None:
    """Check that this account may create training jobs; a cluster that does not say is no reason to refuse.

    Args:
        kind: of the jobs.
        remedy: from account_remedy.

    Raises:
        ConfigError: it may not.
    """
    try:
        is_allowed = KubernetesApi().may("", "create", kind.group, kind.plural)
    except KubernetesError:
        return
    if not is_allowed:
        raise ConfigError(f"no right to create {kind.plural}, which training needs: {remedy}")
