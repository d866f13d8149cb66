"""The launcher against an API server whose controllers are the test: what it asks for, and what it makes of states.

With DICE_TEST_KUBECONFIG set (and DICE_TEST_CRD naming the definition of PyTorchJob, DICE_TEST_TRAINER_CRD that of
TrainJob) these run against that server.
"""

import io
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from dice_core.launch.backend import LaunchError
from dice_core.launch.launch import launch_training
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.settings.base import ConfigError
from dice_core.storage.manifest import clear_stage
from tests.kubernetes_api.by_hand import HandOperated, hand_operated, wait_until
from tests.launchers import Launcher, publish_result, start_process, write_job

pytestmark = pytest.mark.slow

RUNNING = {"running": {"startedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}}


@pytest.fixture
def cluster(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[HandOperated]:
    """Return a fresh namespace of the real API server if there is one, else of the stand-in."""
    for name in ("KUBERNETES_SERVICE_HOST", "POD_NAME", "POD_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)
    with hand_operated(tmp_path, backend) as operated:
        monkeypatch.setenv("KUBECONFIG", str(operated.kubeconfig))
        yield operated


@pytest.fixture
def job_uri(tmp_path: Path) -> str:
    return write_job(tmp_path / "train")


def uid(job: dict[str, Any]) -> str:
    return str(job["metadata"]["uid"])


def workflow(number: int) -> dict[str, str]:
    """Return a reference to a run."""
    kind = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}
    return {**kind, "name": f"run-{number}", "uid": f"6f1c3c1e-0000-4000-8000-{number:012}"}


def run_in_a_pod(monkeypatch: pytest.MonkeyPatch, cluster: HandOperated) -> None:
    """Let launchers believe to run in the pod that create_launcher_pod makes."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("POD_NAME", "launcher")
    monkeypatch.setenv("POD_NAMESPACE", cluster.namespace)


def test_only_succeeded_is_success(cluster: HandOperated, job_uri: str) -> None:
    launcher = Launcher(job_uri)
    job = cluster.the_job()
    assert job["metadata"]["annotations"]["dice-suite/job-uri"] == job_uri
    cluster.set_condition("Created")
    pod = cluster.create_pod()
    cluster.set_pod(pod, "Running", state=RUNNING)
    cluster.set_condition("Running")
    launcher.join(1)
    assert launcher.is_alive()
    cluster.set_condition("Succeeded")
    launcher.result()
    assert [uid(job)] == [uid(left) for left in cluster.jobs()]


def test_the_pods_are_told_of_trackers_and_a_secret_that_they_lack_is_named(
    cluster: HandOperated, job_uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Kubeflow's MLflow plugin gives its variables to the task that launches, and to no pod of the job."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "THE-TOKEN")
    launcher = Launcher(job_uri)
    job = cluster.the_job()
    cluster.set_condition("Succeeded")
    launcher.result()
    [container] = cluster.pod_template(job)["spec"]["containers"]
    assert {"name": "MLFLOW_TRACKING_URI", "value": "https://mlflow.example.com"} in container["env"]
    told = capfd.readouterr().err
    assert told.count("the training pods do not get MLFLOW_TRACKING_TOKEN, which") == 1
    assert "THE-TOKEN" not in str(job) + told


def test_a_failed_job_is_an_error_with_conditions_pods_events_and_exit_code(
    cluster: HandOperated, job_uri: str
) -> None:
    launcher = Launcher(job_uri, num_nodes=2, restart_policy="Never")
    pods = [cluster.create_pod("master"), cluster.create_pod("worker")]
    for pod in pods:
        cluster.set_pod(pod, "Running", state=RUNNING)
    ended = {"exitCode": 137, "reason": "OOMKilled", "startedAt": None, "finishedAt": "2026-01-01T00:00:09Z"}
    cluster.set_pod(pods[1], "Failed", state={"terminated": ended})
    cluster.add_event(pods[1], "NodeNotReady", "Node is not ready")
    cluster.set_condition("Failed", "1 of its pods failed")
    with pytest.raises(LaunchError) as caught:
        launcher.result()
    first, *others = str(caught.value).splitlines()
    assert first.startswith(f"training failed, exit code 137 (killed) in {pods[1]}: OOMKilled (job {cluster.namespace}")
    reason = "PyTorchJobFailed" if cluster.kind.is_restarted else "FailedJobs"
    assert f"condition Failed: {reason}: 1 of its pods failed" in others
    assert f"pod {pods[0]}: Running" in others
    assert f"pod {pods[1]}: Failed, exit code 137 (OOMKilled)" in others
    assert f"event of {pods[1]}: NodeNotReady: Node is not ready" in others


def test_a_job_deleted_by_hand_is_an_error_that_says_so(cluster: HandOperated, job_uri: str) -> None:
    launcher = Launcher(job_uri)
    pod = cluster.create_pod()
    cluster.set_pod(pod, "Running", state=RUNNING)
    cluster.delete_job()
    with pytest.raises(LaunchError, match=rf"{cluster.kind.name} {cluster.namespace}/\S+ was deleted while it ran"):
        launcher.result()
    wait_until(lambda: cluster.jobs() == [])


def test_an_image_that_cannot_be_pulled_ends_at_the_deadline_with_the_reason(
    cluster: HandOperated, job_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = Launcher(job_uri, pending_deadline_seconds=2)
    pod = cluster.create_pod()
    message = 'Back-off pulling image "training:1"'
    cluster.set_pod(pod, "Pending", state={"waiting": {"reason": "ImagePullBackOff", "message": message}})
    with pytest.raises(LaunchError) as caught:
        launcher.result()
    reason = f"{pod}: ImagePullBackOff: {message}"
    assert f"within pods.pending_deadline_seconds = 2: {reason} (job" in str(caught.value)
    assert f"waits for its pods: {reason}" in capfd.readouterr().err
    # Without a launcher it would take GPUs later, and nobody would look.
    wait_until(lambda: cluster.jobs() == [])


def test_a_pod_without_a_node_and_one_that_is_missing_are_named_at_the_deadline(
    cluster: HandOperated, job_uri: str
) -> None:
    launcher = Launcher(job_uri, num_nodes=3, pending_deadline_seconds=1)
    pods = [cluster.create_pod("master"), cluster.create_pod("worker")]
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    cluster.set_pod(pods[0], "Pending", conditions=[unschedulable])
    cluster.add_event(pods[1], "FailedMount", 'configmap "x" not found')
    with pytest.raises(LaunchError) as caught:
        launcher.result()
    assert f"{pods[0]}: Unschedulable: {message}" in str(caught.value)
    assert f'{pods[1]}: FailedMount: configmap "x" not found' in str(caught.value)
    assert "1 of 3 pods not created" in str(caught.value)


def test_a_queued_job_may_wait_longer_than_its_pods_may(cluster: HandOperated, job_uri: str) -> None:
    launcher = Launcher(job_uri, queue_name="dice", pending_deadline_seconds=1)
    job = cluster.the_job()
    assert cluster.kind.is_suspended(job)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "dice"
    launcher.join(1.5)
    assert launcher.is_alive()
    cluster.admit()
    with pytest.raises(LaunchError, match=r"pending_deadline_seconds = 1: 1 of 1 pods not created"):
        launcher.result()


def test_a_second_launcher_adopts_the_running_job_as_it_is(cluster: HandOperated, job_uri: str) -> None:
    first = Launcher(job_uri)
    job = cluster.the_job()
    cluster.set_pod(cluster.create_pod(), "Running", state=RUNNING)
    cluster.set_condition("Running")
    # Settings that ask for more pods are for the next job: this one misses none.
    with redirect_stderr(io.StringIO()) as screen:
        second = Launcher(job_uri, num_nodes=4, pending_deadline_seconds=1)
        wait_until(lambda: "changed since: launch.num_nodes, pods.pending_deadline_seconds\n" in screen.getvalue())
    assert f"adopting {cluster.kind.name}" in screen.getvalue()
    second.join(1.5)
    assert second.is_alive()
    cluster.set_condition("Succeeded")
    first.result()
    second.result()
    assert [uid(job)] == [uid(left) for left in cluster.jobs()]


def test_a_job_that_waits_is_adopted_with_the_same_settings_and_made_anew_with_others(
    cluster: HandOperated, job_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    killed = start_process(job_uri, node_selector={"pool": "tpyo"})
    waits = uid(cluster.the_job())
    killed.kill()
    killed.wait()
    killed = start_process(job_uri, node_selector={"pool": "tpyo"}, on_cancel="leave", stderr=subprocess.PIPE)
    assert killed.stderr is not None
    with killed.stderr as lines:
        assert any(f"adopting {cluster.kind.name}".encode() in line for line in iter(lines.readline, b""))
    killed.kill()
    killed.wait()
    assert [uid(job) for job in cluster.jobs()] == [waits]

    launcher = Launcher(job_uri, node_selector={"pool": "gpus"})
    wait_until(lambda: [uid(job) for job in cluster.jobs()] not in ([], [waits]))
    pod = cluster.pod_template(cluster.the_job())["spec"]
    assert pod["nodeSelector"] == {"pool": "gpus"}
    assert "an earlier attempt waits with other launch settings (pods.node_selector)" in capfd.readouterr().err
    cluster.set_condition("Succeeded")
    launcher.result()


def test_a_launcher_that_adopts_a_job_counts_the_time_it_has_trained_already(
    cluster: HandOperated, job_uri: str
) -> None:
    killed = start_process(job_uri)
    pod = cluster.create_pod()
    killed.kill()
    killed.wait()
    cluster.set_pod(pod, "Running", state={"running": {"startedAt": "2026-01-01T00:00:00Z"}})
    cluster.set_condition("Running")
    with pytest.raises(LaunchError, match=r"did not end within pods.active_deadline_seconds = 172800 of training"):
        Launcher(job_uri).result()
    wait_until(lambda: cluster.jobs() == [])


def test_a_job_that_has_succeeded_is_the_result_and_one_that_has_failed_is_started_again(
    cluster: HandOperated, job_uri: str
) -> None:
    first = Launcher(job_uri, restart_policy="Never")
    failed = cluster.the_job()
    cluster.set_condition("Failed", "a node burnt down")
    with pytest.raises(LaunchError, match="a node burnt down"):
        first.result()

    second = Launcher(job_uri)
    wait_until(lambda: [uid(job) for job in cluster.jobs()] not in ([], [uid(failed)]))
    again = cluster.the_job()
    assert again["metadata"]["name"] == failed["metadata"]["name"]
    publish_result(job_uri)
    cluster.set_condition("Succeeded")
    second.result()

    Launcher(job_uri).result()
    assert [uid(job) for job in cluster.jobs()] == [uid(again)]


def test_a_job_that_has_succeeded_is_made_anew_when_its_result_is_gone(
    cluster: HandOperated, job_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first = Launcher(job_uri)
    succeeded = cluster.the_job()
    publish_result(job_uri)
    cluster.set_condition("Succeeded")
    first.result()
    folder = str(Path(job_uri).parent)
    clear_stage(folder, "train")
    write_job(Path(folder))

    second = Launcher(job_uri)
    wait_until(lambda: [uid(job) for job in cluster.jobs()] not in ([], [uid(succeeded)]))
    assert f"its result is gone from {folder}" in capfd.readouterr().err
    publish_result(job_uri)
    cluster.set_condition("Succeeded")
    second.result()


def test_the_job_belongs_to_the_workflow_of_the_launcher_or_else_to_its_pod(
    cluster: HandOperated, job_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_a_pod(monkeypatch, cluster)
    cluster.create_launcher_pod({**workflow(1), "controller": True})
    Launcher(job_uri)
    assert cluster.the_job()["metadata"]["ownerReferences"] == [workflow(1)]
    cluster.delete_job()
    cluster.core.delete_namespaced_pod("launcher", cluster.namespace, grace_period_seconds=0)

    pod_uid = cluster.create_launcher_pod()
    Launcher(job_uri)
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "launcher", "uid": pod_uid}
    assert cluster.the_job()["metadata"]["ownerReferences"] == [owner]
    cluster.delete_job()


def test_a_job_that_is_adopted_belongs_to_the_run_that_adopts_it(
    cluster: HandOperated, job_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_a_pod(monkeypatch, cluster)
    cluster.create_launcher_pod({**workflow(1), "controller": True})
    killed = start_process(job_uri)
    job = cluster.the_job()
    killed.kill()
    killed.wait()
    cluster.core.delete_namespaced_pod("launcher", cluster.namespace, grace_period_seconds=0)
    cluster.create_launcher_pod({**workflow(2), "controller": True})
    launcher = Launcher(job_uri)
    # Deleting the first run would delete the job under the second.
    wait_until(lambda: cluster.the_job()["metadata"]["ownerReferences"] == [workflow(2)])
    cluster.set_condition("Succeeded")
    launcher.result()
    assert [uid(left) for left in cluster.jobs()] == [uid(job)]


def test_a_launcher_in_another_namespace_does_not_own_the_job(
    cluster: HandOperated, job_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The garbage collector would look for the owner in the job's namespace, and delete the job.
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("POD_NAME", "launcher")
    monkeypatch.setenv("POD_NAMESPACE", "default")
    launcher = Launcher(job_uri)
    assert "ownerReferences" not in cluster.the_job()["metadata"]
    cluster.set_condition("Succeeded")
    launcher.result()


def test_a_killed_launcher_leaves_the_job_and_the_next_one_adopts_it(cluster: HandOperated, job_uri: str) -> None:
    killed = start_process(job_uri)
    job = cluster.the_job()
    killed.kill()
    killed.wait()
    pod = cluster.create_pod()
    cluster.set_pod(pod, "Running", state=RUNNING)
    next_one = start_process(job_uri)
    publish_result(job_uri)
    cluster.set_condition("Succeeded")
    assert next_one.wait(120) == 0
    assert [uid(left) for left in cluster.jobs()] == [uid(job)]


@pytest.mark.parametrize(("on_cancel", "num_left"), [("delete", 0), ("leave", 1)])
def test_a_launcher_told_to_stop_deletes_or_leaves_the_job(
    cluster: HandOperated, job_uri: str, on_cancel: str, num_left: int
) -> None:
    launcher = start_process(job_uri, on_cancel=on_cancel)
    cluster.the_job()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == -signal.SIGTERM
    wait_until(lambda: len(cluster.jobs()) == num_left)


def test_a_launcher_whose_reader_is_gone_deletes_the_job_and_ends_at_once(cluster: HandOperated, job_uri: str) -> None:
    """In an Argo pod the process that reads the launcher's output dies first, and the kill comes a second later."""
    launcher = start_process(job_uri, stderr=subprocess.PIPE)
    assert launcher.stderr is not None
    with launcher.stderr as lines:
        assert any(f"created {cluster.kind.name}".encode() in line for line in iter(lines.readline, b""))
    launcher.send_signal(signal.SIGTERM)
    # About 0.2 s on an idle machine; a call that is repeated, or a line that is waited for, takes many.
    assert launcher.wait(5) == -signal.SIGTERM
    wait_until(lambda: cluster.jobs() == [])


def test_a_launcher_whose_pod_is_evicted_leaves_the_job_for_the_next(
    cluster: HandOperated, job_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_a_pod(monkeypatch, cluster)
    cluster.create_launcher_pod()
    launcher = start_process(job_uri)
    cluster.the_job()
    disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    cluster.set_pod("launcher", "Running", conditions=[disrupted])
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == -signal.SIGTERM
    assert len(cluster.jobs()) == 1


def test_training_is_launched_in_the_pods_that_it_is_given(cluster: HandOperated, backend: str, job_uri: str) -> None:
    pods = PodConfig(image="train:7", memory="2Gi")
    arguments = (job_uri, LaunchConfig.parse({"backend": backend}, "launch"), pods)
    launcher = threading.Thread(target=launch_training, args=arguments, daemon=True)
    launcher.start()
    [container] = cluster.pod_template(cluster.the_job())["spec"]["containers"]
    assert (container["image"], container["resources"]["limits"]["memory"]) == ("train:7", "2Gi")
    cluster.set_condition("Succeeded")
    launcher.join(60)
    assert not launcher.is_alive()


def test_without_a_cluster_the_error_says_what_is_missing(
    job_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"launch.backend 'pytorchjob': no cluster to talk to: no service account"):
        Launcher(job_uri).result()
