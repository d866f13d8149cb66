"""TrainJobs of Kubeflow Trainer v2.3 (trainer.kubeflow.org/v1alpha1). Pure but for an id: see job_kind.py.

Trainer makes a JobSet of a TrainJob and the TrainingRuntime that it names, ours in manifests/components: one Job,
`node`, with a pod for each node. A TrainJob may set what runs and, by a patch, some fields of the pods; the others are
the runtime's, and left_to_the_runtime tells which.

The Job has no retries: a pod that fails or goes ends the whole job, and whoever launches makes it anew. A JobSet that
restarts would take the pods' last words along, and knows no error that is final. docs/training-jobs.md tells more.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from dice_core.launch.job_kind import JobKind, Object, Outcome, run_limits, true_conditions
from dice_core.launch.pod_spec import container_of, pod_template
from dice_core.launch.settings import LaunchConfig, PodConfig

RUNTIME_KIND, RUNTIME_PLURAL = "TrainingRuntime", "trainingruntimes"
REPLICATED_JOB = "node"
"""The Job of the JobSet. Trainer builds the rendezvous' address with this name."""
ANCESTOR_LABEL, ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step", "trainer"
"""Of the Job that spec.trainer is about."""
MADE_LABEL = "dice-suite/made"
"""Of a job and its pods: an id of its own for each that is made, for nothing on a pod tells its TrainJob's uid."""
PATCH_MANAGER = "dice-suite/launcher"
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
_OF_TRAINER = {"image": "image", "command": "command", "env": "env", "resources": "resourcesPerNode"}
"""Fields of a container, and what spec.trainer calls them."""
_PATCHED_IN_CONTAINER = ("volumeMounts", "securityContext")
_PATCHED_IN_POD = (
    "serviceAccountName",
    "volumes",
    "imagePullSecrets",
    "securityContext",
    "nodeSelector",
    "tolerations",
)


class TrainJob(JobKind):
    """See the module."""

    name, group, version, plural = "TrainJob", "trainer.kubeflow.org", "v1alpha1", "trainjobs"
    operator = "Kubeflow Trainer"
    container = "node"
    # A pod's name is the job's plus "-node-0-<index>-<5 characters>".
    longest_name = 46
    # Trainer finds a JobSet by its name alone: one that is still there would be taken for that of the next job.
    deletion = "Foreground"
    is_restarted = False

    def own_labels(self) -> dict[str, str]:
        """See JobKind."""
        return {MADE_LABEL: uuid.uuid4().hex}

    def spec(
        self, launch: LaunchConfig, pods: PodConfig, container: Object, labels: Mapping[str, str]
    ) -> dict[str, Any]:
        """See JobKind."""
        trainer = {"numNodes": launch.num_nodes, "numProcPerNode": launch.processes_per_node}
        trainer |= {theirs: container[ours] for ours, theirs in _OF_TRAINER.items()}
        made = {MADE_LABEL: labels[MADE_LABEL]}
        return {
            "runtimeRef": {"apiGroup": self.group, "kind": RUNTIME_KIND, "name": pods.training_runtime},
            "trainer": trainer,
            "runtimePatches": [_patch(pod_template(container, pods), made)],
            **run_limits(pods),
        }

    def unfit(self, created: Object) -> str:
        """See JobKind. An API server drops what its definition does not know."""
        is_patched = bool(created["spec"].get("runtimePatches"))
        return "" if is_patched else "the cluster's TrainJobs have no runtimePatches: Kubeflow Trainer 2.3 is needed"

    def outcome(self, job: Object) -> Outcome:
        """See JobKind. A condition that is older than the job is that of a JobSet which an earlier one has left."""
        made_at = job["metadata"].get("creationTimestamp") or ""
        own = [found for found in true_conditions(job) if (found.get("lastTransitionTime") or made_at) >= made_at]
        types = {condition["type"] for condition in own}
        # Failed first: a job is a success only if nothing says otherwise.
        if "Failed" in types:
            return "Failed"
        return "Succeeded" if "Complete" in types else ""

    def is_running(self, job: Object) -> bool:
        """See JobKind. There is no condition for that; a Job is ready when all its pods are."""
        if self.outcome(job):
            return False
        return any(found.get("ready") for found in (job.get("status") or {}).get("jobsStatus") or [])

    def is_suspended(self, job: Object) -> bool:
        """See JobKind."""
        return bool(job["spec"].get("suspend"))

    def num_nodes(self, job: Object) -> int:
        """See JobKind."""
        return int(job["spec"]["trainer"]["numNodes"])

    def processes_per_node(self, job: Object) -> int:
        """See JobKind."""
        return int(job["spec"]["trainer"]["numProcPerNode"])

    def pod_selector(self, job: Object) -> str:
        """See JobKind."""
        return f"{MADE_LABEL}={job['metadata']['labels'][MADE_LABEL]}"

    def owns(self, job: Object, pod: Object) -> bool:
        """See JobKind: no other job's pods have the label."""
        return True

    def node_rank(self, pod: Object) -> int:
        """See JobKind."""
        return int((pod["metadata"].get("labels") or {}).get(_INDEX_LABEL, 0))

    def event_selectors(self, job: Object) -> list[str]:
        """See JobKind. The JobSet has the TrainJob's name, and its Job one that follows from it."""
        name = job["metadata"]["name"]
        return [f"involvedObject.name={about}" for about in (name, f"{name}-{REPLICATED_JOB}-0")]


TRAIN_JOB = TrainJob()


def left_to_the_runtime() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the pod's spec, and those of its container, that only a TrainingRuntime can set."""
    pods = PodConfig(image="-")
    container = container_of(TrainJob.container, [], 1, pods, {})
    spec = pod_template(container, pods)["spec"]
    in_container = {*_OF_TRAINER, *_PATCHED_IN_CONTAINER, "name"}
    return (
        {
            "restartPolicy": "Never",
            **{name: value for name, value in spec.items() if name not in (*_PATCHED_IN_POD, "containers")},
        },
        {name: value for name, value in container.items() if name not in in_container},
    )


def runtime_faults(runtime: Object) -> list[str]:
    """Return what keeps a TrainingRuntime from running our training as the launcher expects; a line each."""
    spec = runtime["spec"]
    template = (spec.get("template") or {}).get("spec") or {}
    jobs = {job["name"]: job.get("template") or {} for job in template.get("replicatedJobs") or []}
    faults = (
        []
        if "torch" in (spec.get("mlPolicy") or {})
        else ["spec.mlPolicy has no torch, which gives torchrun its peers"]
    )
    if "ttlSecondsAfterFinished" in template:
        faults.append("its JobSet has ttlSecondsAfterFinished, after which Trainer starts a failed training again")
    if list(jobs) != [REPLICATED_JOB]:
        return [*faults, f"its replicatedJobs are {', '.join(jobs) or 'none'}, one called {REPLICATED_JOB} is wanted"]
    if (jobs[REPLICATED_JOB].get("metadata") or {}).get("labels", {}).get(ANCESTOR_LABEL) != ANCESTOR:
        faults.append(f"its Job lacks the label {ANCESTOR_LABEL}: {ANCESTOR}")
    return [*faults, *_job_faults(jobs[REPLICATED_JOB].get("spec") or {})]


def _job_faults(job: Object) -> list[str]:
    pod = (job.get("template") or {}).get("spec") or {}
    container = next((found for found in pod.get("containers") or [] if found["name"] == TrainJob.container), None)
    if container is None:
        return [f"its pod has no container {TrainJob.container}"]
    of_pod, of_container = left_to_the_runtime()
    wanted = [("Job's backoffLimit", job.get("backoffLimit"), 0)]
    wanted += [(f"pod's {name}", pod.get(name), value) for name, value in of_pod.items()]
    wanted += [(f"container's {name}", container.get(name), value) for name, value in of_container.items()]
    return [f"its {name} is {found!r}, {value!r} is wanted" for name, found, value in wanted if found != value]


def _patch(template: Object, made: Mapping[str, str]) -> dict[str, Any]:
    """Return the patch of the runtime that makes its pods ours."""
    metadata, spec = template["metadata"], template["spec"]
    [container] = spec["containers"]
    pod = {name: spec[name] for name in _PATCHED_IN_POD if name in spec}
    pod["containers"] = [{name: container[name] for name in ("name", *_PATCHED_IN_CONTAINER)}]
    patched = {"metadata": {**metadata, "labels": {**metadata["labels"], **made}}, "spec": pod}
    job = {"name": REPLICATED_JOB, "template": {"spec": {"template": patched}}}
    return {"manager": PATCH_MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
