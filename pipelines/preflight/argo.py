"""Preflight checks of Argo, which runs KFP's workflows: does it retry failed tasks, and how long do finished runs stay?

Both are defaults in Argo's ConfigMap. What a workflow or template says itself wins, and the defaults fill in the rest.
KFP writes the number of retries into a template but no policy, so that the ConfigMap alone decides what is retried.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dice_core.launch.kubernetes import ForbiddenError, KubernetesApi, KubernetesError
from dice_core.settings.durations import show_duration
from pipelines.preflight.findings import UncertainError

CONFIG_MAP = "workflow-controller-configmap"
AGENT = "ml-pipeline-persistenceagent"
_AGENT_TTL = "TTL_SECONDS_AFTER_WORKFLOW_FINISH"
_KFP_NAMESPACE = "kubeflow"
_NO_FAILURES = ("OnError", "OnTransientError")
"""Policies that leave out what exits with an error, and what is killed for its memory."""
_SHORT_SECONDS = 86_400
_COMMANDS = "manifests/README.md has the commands, under 'Retries, and how long a finished run stays'"


@dataclass(frozen=True)
class WorkflowDefaults:
    """What Argo gives a workflow that does not say otherwise."""

    namespace: str
    spec: Mapping[str, Any]

    @property
    def retry(self) -> Mapping[str, Any]:
        """The retry strategy of templates."""
        return dict((self.spec.get("templateDefaults") or {}).get("retryStrategy") or {})

    @property
    def ttl_seconds(self) -> int | None:
        """After how long the first finished workflow is deleted; None: Argo deletes none."""
        values = [value for value in (self.spec.get("ttlStrategy") or {}).values() if value is not None]
        return min(map(int, values), default=None)


def read_defaults(cluster: KubernetesApi) -> WorkflowDefaults:
    """Find Argo's ConfigMap: in the namespace, or where several namespaces share a Kubeflow.

    Raises:
        UncertainError: it is in neither.
        ForbiddenError: whoever asks may not look.
        KubernetesError: it cannot be read.
    """
    for namespace in dict.fromkeys((cluster.namespace, _KFP_NAMESPACE)):
        found = cluster.get(cluster.path("configmaps", CONFIG_MAP, namespace=namespace))
        if found is not None:
            return WorkflowDefaults(namespace, parse_defaults(found.get("data") or {}))
    raise UncertainError(
        f"no ConfigMap {CONFIG_MAP} in namespace {cluster.namespace} or {_KFP_NAMESPACE}: ask whoever runs Kubeflow "
        f"Pipelines; {_COMMANDS}"
    )


def parse_defaults(data: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the `spec` of the defaults in a ConfigMap's data.

    Args:
        data: with a key for each part of the configuration, or the one key `config` with all of them.

    Raises:
        KubernetesError: not YAML of that form.
    """
    import yaml

    try:
        if "config" in data:
            defaults = (yaml.safe_load(data["config"]) or {}).get("workflowDefaults")
        else:
            defaults = yaml.safe_load(data.get("workflowDefaults", ""))
        spec = (defaults or {}).get("spec") or {}
        return dict(spec)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise KubernetesError(f"ConfigMap {CONFIG_MAP}: workflowDefaults cannot be read: {line}") from None


def check_retries(cluster: KubernetesApi, num_retries: int) -> str:
    """Look whether a task that fails is tried again.

    Raises:
        KubernetesError: it never is.
        UncertainError: it may be, or more often than the run asks for.
    """
    defaults = read_defaults(cluster)
    strategy = defaults.retry
    # Argo's own policy, where neither the template nor the defaults have one.
    policy = strategy.get("retryPolicy") or ("Always" if strategy.get("expression") else "OnFailure")
    where = f"ConfigMap {CONFIG_MAP} in namespace {defaults.namespace}"
    if policy in _NO_FAILURES:
        raise KubernetesError(
            f"{where} has retryPolicy {policy}: a task that fails or runs out of memory is not tried again, "
            f"num_retries={num_retries} or not. Whoever runs Kubeflow Pipelines sets Always: {_COMMANDS}; to do "
            "without retries: SET=num_retries=0"
        )
    if strategy.get("expression"):
        raise UncertainError(
            f"{where} has an expression, {strategy['expression']!r}, which may keep a task from being tried again: "
            "read it, or remove it"
        )
    if str(strategy.get("limit", "0")) != "0":
        raise UncertainError(
            f"{where} has retryPolicy {policy} with limit {strategy['limit']}: the frames around each task are tried "
            f"again too, and multiply its attempts: set limit: '0', a task has its own. {_COMMANDS}"
        )
    return f"a task that fails is tried again, {num_retries} times at most (retryPolicy {policy})"


def check_ttl(cluster: KubernetesApi) -> str:
    """Look how long a finished run stays on the cluster.

    Raises:
        UncertainError: shorter than a day.
    """
    defaults = read_defaults(cluster)
    agent = _agent_ttl(cluster, defaults.namespace)
    known = [seconds for seconds in (defaults.ttl_seconds, agent) if seconds is not None]
    if not known:
        return "nothing says that finished runs are deleted"
    stays, seconds = f"a finished run stays {show_duration(min(known))}", min(known)
    if seconds < _SHORT_SECONDS:
        raise UncertainError(
            f"{stays}, then its workflow, its pods (make logs) and its training job are deleted: {_COMMANDS}"
        )
    return f"{stays}, then its pods (make logs) and its training job are deleted"


def _agent_ttl(cluster: KubernetesApi, namespace: str) -> int | None:
    """Return after how long KFP's persistence agent has a finished workflow deleted; None: it cannot be seen."""
    try:
        path = cluster.path("deployments", AGENT, group="apps", namespace=namespace)
        containers = (cluster.get(path) or {})["spec"]["template"]["spec"]["containers"]
    except (ForbiddenError, KeyError):
        return None
    values = [entry.get("value") for part in containers for entry in part.get("env", ()) if entry["name"] == _AGENT_TTL]
    return next((int(value) for value in values if value), None)
