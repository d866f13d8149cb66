"""What a run that was stopped leaves on the cluster, as `make cancel` deletes it: training jobs, pods never started.

Terminating a run ends neither. The launcher of training deletes its job when it is told to stop, but seldom gets the
time: Argo stops KFP's own launcher, which hands no signal on, and kills all processes of the pod a moment later. The
job's owner, the workflow, stays, so that nothing else would end the job before its deadline. A pod that waits for a
node or an image has no process to stop: Argo leaves it as it is, and its requests count.
"""

import sys
from collections.abc import Mapping
from typing import Any

from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.launch.job_spec import RUN_LABEL
from dice_core.launch.jobs import TrainingJobs
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.stages import recurring_name as recurring
from dice_core.storage import layout
from pipelines.cluster.workflow import KFP_RUN_LABEL

_FORBIDDEN = 403
_DELETE = "kubectl --namespace {} delete {} --selector {}={}"
_DELETE_PODS = "kubectl --namespace {} delete pods --selector {}={} --field-selector status.phase=Pending"


def stop_training(context: str, namespace: str, run: Any) -> None:
    """Delete the jobs of a run that have not ended; without access to the cluster, say how to.

    Of every kind: a run that was continued may have had another backend before, and KFP may leave out a parameter that
    has its default.

    Args:
        context: of the kubeconfig; empty: the current one.
        namespace: of the run.
        run: of KFP, with its parameters.
    """
    parameters, name = parameters_of(run), own_name(run)
    launch = parameters.get("launch") or {}
    told = JOB_KINDS.get(str(launch.get("backend")))
    if not (name and parameters.get("root")) or (launch and told is None):
        return
    if launch.get("on_cancel") == "leave" and told:
        by_hand = _DELETE.format(namespace, told.plural, RUN_LABEL, name)
        print(f"run {name}: training goes on, as launch.on_cancel=leave says; to stop it: {by_hand}")
        return
    for kind in sorted(JOB_KINDS.values(), key=lambda kind: kind is not told):
        try:
            _delete_unfinished(TrainingJobs(KubernetesApi(namespace, context=context), kind), parameters, name)
        except KubernetesError as error:
            # Whoever may not look at a kind that the run does not name need not: clusters rarely have both.
            if error.status != _FORBIDDEN or kind is told or told is None:
                by_hand = _DELETE.format(namespace, kind.plural, RUN_LABEL, name)
                print(f"pipelines: {error}; training may go on, to stop it: {by_hand}", file=sys.stderr)
            if not error.status:
                return


def _delete_unfinished(jobs: TrainingJobs, parameters: Mapping[str, Any], name: str) -> None:
    for job in jobs.unfinished(layout.run(str(parameters["root"]), name)):
        is_deleted = jobs.delete(job["metadata"]["name"], job["metadata"]["uid"])
        done = "is deleted" if is_deleted else "has ended meanwhile"
        print(f"run {name}: {jobs.kind.name} {jobs.namespace}/{job['metadata']['name']} {done}")


def delete_pods_not_started(context: str, namespace: str, run: Any) -> None:
    """Delete the pods of a run that were never started, KFP's own among them; where one may not, say how to.

    Args:
        context: of the kubeconfig; empty: the current one.
        namespace: of the run.
        run: of KFP, stopped or ended: nothing makes its pods anew.
    """
    try:
        cluster = KubernetesApi(namespace, context=context)
        for pod in cluster.list(cluster.path("pods"), labelSelector=f"{KFP_RUN_LABEL}={run.run_id}"):
            name, phase = pod["metadata"]["name"], pod.get("status", {}).get("phase")
            if phase == "Pending" and cluster.delete(cluster.path("pods", name), pod["metadata"]["uid"]):
                print(f"pod {namespace}/{name}, which had not started, is deleted")
    except KubernetesError as error:
        by_hand = _DELETE_PODS.format(namespace, KFP_RUN_LABEL, run.run_id)
        print(f"pipelines: {error}; pods that never started may stay, to delete them: {by_hand}", file=sys.stderr)


def own_name(run: Any) -> str:
    """Return the name that a run has in S3; it ends in a part of its id where it is a recurring one, or was not named.

    Empty where the run has no parameter of that kind: it is of another pipeline.
    """
    parameters = parameters_of(run)
    # KFP may leave out what has its default.
    if not {"root", "run"} & parameters.keys():
        return ""
    name = str(parameters.get("run", ""))
    if name and run.recurring_run_id:
        return recurring.run_name(name, str(run.run_id))
    return recurring.given_or_new(name, str(parameters.get("promote_as", "")), str(run.run_id))


def parameters_of(run: Any) -> Mapping[str, Any]:
    """Return the parameters that a run was started with."""
    return (run.runtime_config.parameters if run.runtime_config else None) or {}
