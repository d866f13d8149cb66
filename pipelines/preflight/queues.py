"""Preflight checks of quotas and queues: will training be admitted?"""

from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.launch.settings import LaunchConfig
from dice_core.settings.quantities import quantity
from pipelines.cluster.config import ClusterConfig

_KUEUE = "/apis/kueue.x-k8s.io"


def check_quota(cluster: KubernetesApi, config: ClusterConfig, launch: LaunchConfig, num_shards: int) -> str:
    """Compare the namespace's GPU quotas with the most GPUs that training holds at once."""
    name = f"requests.{config.gpu_resource}"
    needed, shown = launch.num_nodes * launch.processes_per_node, []
    for quota in cluster.list(f"/api/v1/namespaces/{cluster.namespace}/resourcequotas"):
        hard = quota["spec"].get("hard", {}).get(name)
        if hard is None:
            continue
        if quantity(hard) < needed:
            raise KubernetesError(
                f"{quota['metadata']['name']} allows {hard} {config.gpu_resource}, training holds {needed}: raise it "
                "in the overlay"
            )
        shown.append(f"{quota['metadata']['name']} allows {hard} GPUs, training holds {needed}, shards {num_shards}")
    return "; ".join(shown) or "none on GPUs"


def check_queue(cluster: KubernetesApi, name: str) -> str:
    """Check that Kueue's queue exists and admits jobs: a job in a missing queue waits, and nothing says so."""
    kueue = cluster.get(_KUEUE)
    if kueue is None:
        raise KubernetesError(
            f"cluster.queue_name is {name!r} and the API knows no Kueue, so that training would only wait: install "
            "it (manifests/README.md names the release), or SET=cluster.queue_name="
        )
    queues = f"/apis/{kueue['preferredVersion']['groupVersion']}/namespaces/{cluster.namespace}/localqueues"
    queue = cluster.get(f"{queues}/{name}")
    if queue is None:
        known = ", ".join(entry["metadata"]["name"] for entry in cluster.list(queues)) or "none"
        raise KubernetesError(
            f"no LocalQueue {name} in namespace {cluster.namespace}, training would only wait; there are: {known}: "
            "correct cluster.queue_name, or make deploy OVERLAY=kueue, which makes dice"
        )
    conditions = {entry["type"]: entry for entry in queue.get("status", {}).get("conditions", ())}
    active = conditions.get("Active", {"message": "its state is not known, does Kueue's controller run?"})
    if active.get("status") != "True":
        raise KubernetesError(
            f"LocalQueue {name} admits no job ({active.get('message')}): see kubectl describe clusterqueue "
            f"{queue['spec']['clusterQueue']}"
        )
    return f"LocalQueue {name} is active, of ClusterQueue {queue['spec']['clusterQueue']}"
