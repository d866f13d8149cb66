"""Preflight checks of who controls training jobs on the cluster: the training operator, or Kubeflow Trainer."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from dice_core.launch.job_kind import JobKind
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.launch.settings import LaunchConfig
from dice_core.launch.trainjob import RUNTIME_PLURAL, TRAIN_JOB, runtime_faults
from pipelines.cluster.config import ClusterConfig
from pipelines.preflight.findings import Line, checked

_DEFINITION = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{TRAIN_JOB.plural}.{TRAIN_JOB.group}"
_PATCHES = "runtimePatches"
_COMPONENT = "add components/training-runtime to your overlay and make deploy OVERLAY=..."


def controller_lines(
    cluster: KubernetesApi, kind: JobKind, launch: LaunchConfig, config: ClusterConfig
) -> Iterator[Line]:
    """Yield the checks of whoever controls the jobs of a kind."""
    if kind is not TRAIN_JOB:
        yield checked("training operator", partial(check_operator, cluster, launch))
        return
    yield checked("Kubeflow Trainer", partial(check_trainer, cluster))
    yield checked("fields of TrainJobs", partial(check_fields, cluster))
    name = config.training_runtime
    yield checked(f"training runtime {name}", partial(check_runtime, cluster, name))


def check_operator(cluster: KubernetesApi, launch: LaunchConfig) -> str:
    """Check that PyTorchJob exists, and say what the operator adds to pods, which can keep them from starting."""
    if "pytorchjobs" not in _served(cluster, "kubeflow.org/v1"):
        raise KubernetesError(
            "the API knows no PyTorchJob: install the training operator (manifests/README.md names the release), or "
            "train in the task's own pod: SET=launch.backend=torchrun"
        )
    workers = "; it adds a container of alpine:3.10 to Workers unless told otherwise (manifests/README.md)"
    return "PyTorchJob kubeflow.org/v1" + (workers if launch.num_nodes > 1 else "")


def check_trainer(cluster: KubernetesApi) -> str:
    """Check that TrainJobs are served in the version that the launcher makes, and JobSets, which Trainer makes."""
    group = cluster.get(f"/apis/{TRAIN_JOB.group}")
    if group is None:
        raise KubernetesError(
            "the API knows no TrainJob: install Kubeflow Trainer (manifests/README.md names the release), or "
            "SET=launch.backend=pytorchjob, which needs the training operator"
        )
    served = [entry["version"] for entry in group["versions"]]
    if TRAIN_JOB.version not in served:
        raise KubernetesError(
            f"the API serves TrainJobs as {', '.join(served)}, and the launcher makes {TRAIN_JOB.version}: install a "
            "release that serves it (manifests/README.md names one)"
        )
    if TRAIN_JOB.plural not in _served(cluster, f"{TRAIN_JOB.group}/{TRAIN_JOB.version}"):
        raise KubernetesError(f"the API serves {TRAIN_JOB.group} and no TrainJob: install Kubeflow Trainer as a whole")
    if cluster.get("/apis/jobset.x-k8s.io") is None:
        raise KubernetesError("the API knows no JobSet, which Trainer makes of a TrainJob: install JobSet")
    return f"TrainJob {TRAIN_JOB.group}/{TRAIN_JOB.version}"


def check_fields(cluster: KubernetesApi) -> str:
    """Check that a TrainJob may patch its runtime: before 2.2 an API server drops the patch without a word."""
    definition = cluster.get(_DEFINITION)
    versions: list[dict[str, Any]] = definition["spec"]["versions"] if definition else []
    for version in versions:
        spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        if version["name"] == TRAIN_JOB.version and _PATCHES in spec:
            return f"{_PATCHES} is known"
    raise KubernetesError(f"the definition of TrainJob has no {_PATCHES}: Kubeflow Trainer 2.3 or newer is needed")


def check_runtime(cluster: KubernetesApi, name: str) -> str:
    """Check that the TrainingRuntime is there, and makes the pods that the launcher expects."""
    path = cluster.path(RUNTIME_PLURAL, name, group=TRAIN_JOB.group, version=TRAIN_JOB.version)
    found = cluster.get(path)
    if found is None:
        raise KubernetesError(f"there is none in namespace {cluster.namespace}: {_COMPONENT}")
    if faults := runtime_faults(found):
        raise KubernetesError(f"{'; '.join(faults)}: begin with the suite's (manifests/components/training-runtime)")
    return f"in namespace {cluster.namespace}"


def _served(cluster: KubernetesApi, version: str) -> set[str]:
    """Return the resources of a version of a group."""
    found = cluster.get(f"/apis/{version}")
    return {entry["name"] for entry in found["resources"]} if found else set()
