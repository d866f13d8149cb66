"""What the launcher relies on of an API server, asked with the real client: the same of the stand-in and of a real one.

With DICE_TEST_KUBECONFIG set these run against that server, and so tell whether the stand-in behaves as it does.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import ApiException

from dice_core.launch.pytorchjob import PYTORCH_JOB
from dice_core.launch.settings import LaunchConfig, PodConfig
from tests.kubernetes_api.by_hand import HandOperated, hand_operated

pytestmark = pytest.mark.slow

JOBS = ("kubeflow.org", "v1")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[HandOperated]:
    with hand_operated(tmp_path) as operated:
        yield operated


def body(name: str = "dice-job") -> dict[str, Any]:
    return PYTORCH_JOB.body(name, "s3://b/job.json", LaunchConfig(), PodConfig(image="train:1"), environment={})


def create(cluster: HandOperated, job: dict[str, Any]) -> dict[str, Any]:
    return dict(cluster.custom.create_namespaced_custom_object(*JOBS, cluster.namespace, "pytorchjobs", job))


def get(cluster: HandOperated, name: str = "dice-job") -> dict[str, Any]:
    return dict(cluster.custom.get_namespaced_custom_object(*JOBS, cluster.namespace, "pytorchjobs", name))


def refused(call: Any) -> tuple[int, str, str]:
    """Return code, reason and message of a call's refusal."""
    with pytest.raises(ApiException) as caught:
        call()
    status = json.loads(caught.value.body)
    assert (status["kind"], status["status"], status["code"]) == ("Status", "Failure", caught.value.status)
    return caught.value.status, status["reason"], status["message"]


def test_a_name_is_taken_once_and_a_missing_one_is_not_found(cluster: HandOperated) -> None:
    create(cluster, body())
    taken = 'pytorchjobs.kubeflow.org "dice-job" already exists'
    assert refused(lambda: create(cluster, body())) == (409, "AlreadyExists", taken)
    missing = 'pytorchjobs.kubeflow.org "dice-other" not found'
    assert refused(lambda: get(cluster, "dice-other")) == (404, "NotFound", missing)


def test_what_does_not_fit_is_invalid(cluster: HandOperated) -> None:
    without_replicas = body()
    del without_replicas["spec"]["pytorchReplicaSpecs"]
    code, reason, message = refused(lambda: create(cluster, without_replicas))
    assert (code, reason) == (422, "Invalid")
    assert "spec.pytorchReplicaSpecs: Required value" in message
    owned_by_nobody = body()
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "launcher", "uid": ""}
    owned_by_nobody["metadata"]["ownerReferences"] = [owner]
    assert refused(lambda: create(cluster, owned_by_nobody))[:2] == (422, "Invalid")
    assert refused(lambda: create(cluster, body("Not_A_Name")))[:2] == (422, "Invalid")


def test_a_stale_update_is_a_conflict_and_the_status_is_written_apart(cluster: HandOperated) -> None:
    created = create(cluster, {**body(), "status": {"conditions": [{"type": "Succeeded", "status": "True"}]}})
    # A status that comes with a new object is dropped.
    assert not created.get("status")
    cluster.set_condition("Running")
    job = get(cluster)
    assert [condition["type"] for condition in job["status"]["conditions"]] == ["Running"]
    assert job["metadata"]["resourceVersion"] != created["metadata"]["resourceVersion"]

    def write_status() -> None:
        call = cluster.custom.replace_namespaced_custom_object_status
        call(*JOBS, cluster.namespace, "pytorchjobs", "dice-job", created)

    assert refused(write_status)[:2] == (409, "Conflict")


def test_a_deletion_may_insist_on_the_uid(cluster: HandOperated) -> None:
    uid = create(cluster, body())["metadata"]["uid"]

    def delete(of: str) -> Any:
        options = {"preconditions": {"uid": of}, "propagationPolicy": "Background"}
        call = cluster.custom.delete_namespaced_custom_object
        return call(*JOBS, cluster.namespace, "pytorchjobs", "dice-job", body=options)

    other = "00000000-0000-4000-8000-000000000000"
    assert refused(lambda: delete(other))[:2] == (409, "Conflict")
    assert delete(uid)["status"] == "Success"
    assert refused(lambda: get(cluster))[0] == 404


def test_pods_of_a_job_and_events_about_them_are_found_by_selectors(cluster: HandOperated) -> None:
    create(cluster, body())
    pod = cluster.create_pod()
    cluster.add_event(pod, "FailedScheduling", "0/1 nodes are available")
    listed = cluster.core.list_namespaced_pod(
        cluster.namespace, label_selector="training.kubeflow.org/job-name=dice-job"
    )
    [found] = listed.items
    assert (found.metadata.name, found.status.phase) == (pod, "Pending")
    uid = found.metadata.uid
    events = cluster.core.list_namespaced_event(cluster.namespace, field_selector=f"involvedObject.uid={uid}")
    assert [(event.reason, event.involved_object.name) for event in events.items] == [("FailedScheduling", pod)]
    none = cluster.core.list_namespaced_pod(cluster.namespace, label_selector="training.kubeflow.org/job-name=other")
    assert none.items == []
