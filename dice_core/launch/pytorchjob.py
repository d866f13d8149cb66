"""PyTorchJobs of the training operator, v1.7 to v1.9, which is closed upstream. Pure: see job_kind.py.

One pod, the Master, holds a node's processes; further nodes are Workers. The operator starts pods again that have
failed or gone, up to a limit.
"""

from collections.abc import Mapping
from typing import Any

from dice_core.launch.job_kind import JobKind, Object, Outcome, run_limits, true_conditions
from dice_core.launch.pod_spec import pod_template
from dice_core.launch.settings import LaunchConfig, PodConfig

_JOB_NAME_LABEL = "training.kubeflow.org/job-name"
_REPLICA_TYPE_LABEL = "training.kubeflow.org/replica-type"
_REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"


class PyTorchJob(JobKind):
    """See the module."""

    name, group, version, plural = "PyTorchJob", "kubeflow.org", "v1", "pytorchjobs"
    operator = "the training operator"
    container = "pytorch"
    # A pod's and a service's name is the job's plus "-worker-<index>".
    longest_name = 50
    deletion = "Background"
    is_restarted = True

    def spec(
        self, launch: LaunchConfig, pods: PodConfig, container: Object, labels: Mapping[str, str]
    ) -> dict[str, Any]:
        """See JobKind."""
        replica = {"restartPolicy": launch.restart_policy, "template": pod_template(container, pods)}
        replicas = {"Master": {"replicas": 1, **replica}}
        if launch.num_nodes > 1:
            replicas["Worker"] = {"replicas": launch.num_nodes - 1, **replica}
        return {
            "nprocPerNode": str(launch.processes_per_node),
            "runPolicy": {
                "cleanPodPolicy": pods.clean_pod_policy,
                "ttlSecondsAfterFinished": pods.ttl_seconds_after_finished,
                "backoffLimit": launch.backoff_limit,
                **run_limits(pods),
            },
            "pytorchReplicaSpecs": replicas,
        }

    def outcome(self, job: Object) -> Outcome:
        """See JobKind."""
        types = {condition["type"] for condition in true_conditions(job)}
        # Failed first: a job is a success only if nothing says otherwise.
        if "Failed" in types:
            return "Failed"
        return "Succeeded" if "Succeeded" in types else ""

    def is_running(self, job: Object) -> bool:
        """See JobKind."""
        return any(condition["type"] == "Running" for condition in true_conditions(job))

    def is_suspended(self, job: Object) -> bool:
        """See JobKind."""
        return bool(job["spec"].get("runPolicy", {}).get("suspend"))

    def num_nodes(self, job: Object) -> int:
        """See JobKind."""
        return sum(replica.get("replicas", 1) for replica in job["spec"]["pytorchReplicaSpecs"].values())

    def processes_per_node(self, job: Object) -> int:
        """See JobKind."""
        return int(job["spec"]["nprocPerNode"])

    def pod_selector(self, job: Object) -> str:
        """See JobKind."""
        return f"{_JOB_NAME_LABEL}={job['metadata']['name']}"

    def owns(self, job: Object, pod: Object) -> bool:
        """See JobKind."""
        owners = pod["metadata"].get("ownerReferences") or []
        return any(owner["uid"] == job["metadata"]["uid"] for owner in owners)

    def node_rank(self, pod: Object) -> int:
        """See JobKind: the Master is 0, Workers follow."""
        labels = pod["metadata"].get("labels") or {}
        index = int(labels.get(_REPLICA_INDEX_LABEL, 0))
        return index + 1 if labels.get(_REPLICA_TYPE_LABEL, "").lower() == "worker" else index

    def event_selectors(self, job: Object) -> list[str]:
        """See JobKind: the operator reports all about the job itself."""
        return [f"involvedObject.uid={job['metadata']['uid']}"]


PYTORCH_JOB = PyTorchJob()
