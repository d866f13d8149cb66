"""Preflight checks of quotas and queues: will training be admitted?

Kueue's own configuration says which kinds of jobs it manages; one that it does not manage stays suspended for ever.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import yaml

from dice_core.launch.job_kind import JobKind
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.launch.pod_spec import container_of
from dice_core.launch.settings import LaunchConfig
from dice_core.launch.trainjob import TRAIN_JOB
from dice_core.settings.quantities import quantity
from pipelines.cluster.config import ClusterConfig
from pipelines.cluster.training_pods import training_pods
from pipelines.preflight.findings import Line, UncertainError, checked

_KUEUE = "/apis/kueue.x-k8s.io"
_CONFIG_MAP, _CONFIG_KEY, _KUEUE_NAMESPACE = "kueue-manager-config", "controller_manager_config.yaml", "kueue-system"
_CONTROLLER = f"/apis/apps/v1/namespaces/{_KUEUE_NAMESPACE}/deployments/kueue-controller-manager"
_FIRST_WITH_TRAIN_JOBS = {(0, 18): 8, (0, 19): 4}
"""Minor releases of Kueue that know Trainer 2.2, and the first fix of each that keeps what Trainer 2.3 has beside it.

Before it (kubernetes-sigs/kueue 14836, 15197), Kueue writes a TrainJob that it admits without the fields that it does
not know, so that it never starts, and with a flavor's tolerations in place of its own. v0.20 knows Trainer 2.3.
"""


def queue_lines(
    cluster: KubernetesApi, config: ClusterConfig, launch: LaunchConfig, kind: JobKind | None
) -> Iterator[Line]:
    """Yield the checks of Kueue: the queue, what it covers, and whether Kueue manages what is put into it."""
    yield checked("queue", partial(check_queue, cluster, config.queue_name))
    if kind:
        yield checked("queue's resources", partial(check_covered, cluster, config, launch))
    yield checked("what Kueue manages", partial(check_frameworks, cluster, kind))
    if kind is TRAIN_JOB:
        yield checked("Kueue's release", partial(check_release, cluster))


def check_quota(
    cluster: KubernetesApi, config: ClusterConfig, launch: LaunchConfig, num_shards: int, gpus_of_tasks: Sequence[int]
) -> str:
    """Compare the namespace's GPU quotas with what must start at once: training, and each of the tasks with GPUs.

    Args:
        cluster: with the quotas.
        config: names the resource.
        launch: how many processes train.
        num_shards: tasks that sample side by side where the quota lets them.
        gpus_of_tasks: of one that samples, and of one that evaluates.
    """
    name, shown = f"requests.{config.gpu_resource}", []
    holds = {"training": launch.num_nodes * launch.processes_per_node, "a task": max(gpus_of_tasks)}
    who, needed = max(holds.items(), key=lambda entry: entry[1])
    for quota in cluster.list(f"/api/v1/namespaces/{cluster.namespace}/resourcequotas"):
        hard = quota["spec"].get("hard", {}).get(name)
        if hard is None:
            continue
        if quantity(hard) < needed:
            raise KubernetesError(
                f"{quota['metadata']['name']} allows {hard} {config.gpu_resource}, {who} holds {needed}: raise it "
                "in the overlay"
            )
        held = f"training holds {holds['training']}, shards {num_shards * gpus_of_tasks[0]}"
        shown.append(f"{quota['metadata']['name']} allows {hard} GPUs, {held}")
    return "; ".join(shown) or "none on GPUs"


def check_queue(cluster: KubernetesApi, name: str) -> str:
    """Check that Kueue's queue exists and admits jobs: a job in a missing queue waits, and nothing says so."""
    version = _version(cluster)
    if not version:
        raise KubernetesError(
            f"cluster.queue_name is {name!r} and the API knows no Kueue, so that training would only wait: install "
            "it (manifests/README.md names the release), or SET=cluster.queue_name="
        )
    queues = f"/apis/{version}/namespaces/{cluster.namespace}/localqueues"
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


def check_covered(cluster: KubernetesApi, config: ClusterConfig, launch: LaunchConfig) -> str:
    """Check that the ClusterQueue covers each resource that a training pod requests: else no job is ever admitted."""
    version = _version(cluster)
    queue = cluster.get(f"/apis/{version}/namespaces/{cluster.namespace}/localqueues/{config.queue_name}")
    pods = training_pods(launch, config)
    if not version or queue is None or pods is None:
        raise UncertainError("there is no queue to look at")
    name = queue["spec"]["clusterQueue"]
    found = cluster.get(f"/apis/{version}/clusterqueues/{name}")
    if found is None:
        raise KubernetesError(f"there is no ClusterQueue {name}, which LocalQueue {config.queue_name} leads to")
    covered = {each for group in found["spec"].get("resourceGroups") or [] for each in group["coveredResources"]}
    # Training asks for as much disk as the model needs where nobody says how much.
    sized = pods.model_copy(update={"disk": pods.disk or "1Gi"})
    container = container_of("training", [], launch.processes_per_node, sized, {})
    if missing := sorted(container["resources"]["requests"].keys() - covered):
        raise KubernetesError(
            f"ClusterQueue {name} does not cover {', '.join(missing)}, which training pods request, so that training "
            "would only wait: add it to coveredResources, with a quota"
        )
    return f"ClusterQueue {name} covers what training pods request"


def check_frameworks(cluster: KubernetesApi, kind: JobKind | None) -> str:
    """Look into Kueue's configuration whether it manages the jobs that train, and pods, as which tasks run.

    Raises:
        UncertainError: it is not where Kueue's own manifests put it, or cannot be read as what it is.
    """
    path = cluster.path("configmaps", _CONFIG_MAP, namespace=_KUEUE_NAMESPACE)
    text = ((cluster.get(path) or {}).get("data") or {}).get(_CONFIG_KEY)
    if text is None:
        raise UncertainError(
            f"no ConfigMap {_CONFIG_MAP} with {_CONFIG_KEY} in namespace {_KUEUE_NAMESPACE}: ask whoever runs Kueue "
            "whether it manages " + (f"{kind.name}s" if kind else "pods")
        )
    managed = _frameworks(text)
    place = f"integrations.frameworks of ConfigMap {_KUEUE_NAMESPACE}/{_CONFIG_MAP}"
    if kind and f"{kind.group}/{kind.name.lower()}" not in managed:
        raise KubernetesError(
            f"Kueue does not manage {kind.name}s here, so that training would only wait: add "
            f"{kind.group}/{kind.name.lower()} to {place} and restart Kueue (from v0.19 on, PyTorchJobs are not among "
            "its defaults), or SET=cluster.queue_name="
        )
    known = [*([f"{kind.name}s"] if kind else []), *(["pods"] if "pod" in managed else [])]
    told = f"{' and '.join(known) or 'nothing of a run'}, by {place}"
    return told if "pod" in managed else f"{told}; tasks with GPUs start without waiting: pod is not in it"


def check_release(cluster: KubernetesApi) -> str:
    """Check that Kueue lets TrainJobs go as they were made.

    Raises:
        UncertainError: its release cannot be told.
    """
    found = cluster.get(_CONTROLLER)
    containers = found["spec"]["template"]["spec"]["containers"] if found else []
    release = next((match for one in containers if (match := re.search(r":v(\d+)\.(\d+)\.(\d+)", one["image"]))), None)
    good = "v0.18.8, v0.19.4 or v0.20 (or newer)"
    if release is None:
        raise UncertainError(f"the image of Kueue's controller does not tell: TrainJobs need {good}")
    major, minor, fix = (int(number) for number in release.groups())
    first = _FIRST_WITH_TRAIN_JOBS.get((major, minor), 0)
    if (major, minor) < min(_FIRST_WITH_TRAIN_JOBS) or fix < first:
        raise KubernetesError(
            f"{release[0][1:]} changes TrainJobs of Trainer 2.3 when it admits them, so that they may never start: "
            f"install {good}, or SET=cluster.queue_name="
        )
    return f"{release[0][1:]}, with TrainJobs of Trainer 2.3"


def _frameworks(text: str) -> list[str]:
    try:
        config: Any = yaml.safe_load(text)
        return [str(name) for name in (config.get("integrations") or {}).get("frameworks") or []]
    except (yaml.YAMLError, AttributeError, TypeError):
        raise UncertainError(
            f"{_CONFIG_KEY} of ConfigMap {_KUEUE_NAMESPACE}/{_CONFIG_MAP} is no YAML mapping, look at it yourself"
        ) from None


def _version(cluster: KubernetesApi) -> str:
    """Return group and version of Kueue's objects; empty: the API knows none."""
    kueue = cluster.get(_KUEUE)
    return str(kueue["preferredVersion"]["groupVersion"]) if kueue else ""
