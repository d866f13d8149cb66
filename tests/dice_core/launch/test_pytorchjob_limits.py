"""How long and how often a training job may try, on a cluster whose operator counts too; pods are local processes."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from dice_core.launch.backend import FinalError, LaunchError
from tests.kubernetes_api.by_hand import wait_until
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.store import JOB, WORKLOAD, Object
from tests.kubernetes_api.training_operator import TrainingOperator
from tests.launchers import Launcher, Make, num_created, pods, running, start_process

pytestmark = pytest.mark.slow


def the_job(server: ApiServer) -> Object:
    [job] = server.store.find(JOB, "default")
    return job


def test_a_job_that_waits_for_its_pods_keeps_all_its_time_to_train(
    server: ApiServer, operator: TrainingOperator, job_uri: str, worker: Make
) -> None:
    operator.kubelet.image_pull_fails = True
    launcher = Launcher(job_uri, worker(""), pending_deadline_seconds=120, active_deadline_seconds=6)
    wait_until(lambda: bool(pods(server)))
    # Longer than it may train; the operator counts this too.
    launcher.join(7)
    assert launcher.is_alive()
    operator.kubelet.image_pull_fails = False
    launcher.result()
    assert num_created(server) == 1


def test_a_training_that_lasts_too_long_is_ended_with_the_reason_and_its_last_lines(
    server: ApiServer, operator: TrainingOperator, job_uri: str, worker: Make
) -> None:
    command = worker('print("[default0]:step 7", flush=True)\ntime.sleep(300)')
    with pytest.raises(LaunchError) as caught:
        Launcher(job_uri, command, active_deadline_seconds=6).result()
    first, *others = str(caught.value).splitlines()
    assert first.startswith(
        "training failed: it did not end within pods.active_deadline_seconds = 6 of training; started again, the "
        "stage goes on from the newest checkpoint (job default/dice-"
    )
    assert others[-1] == "[rank 0] step 7"
    # Without a launcher it would go on.
    wait_until(lambda: not pods(server) and not server.store.find(JOB, "default"))


def test_the_operator_ends_a_job_that_no_launcher_follows(
    server: ApiServer, operator: TrainingOperator, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    command = worker("time.sleep(300)")
    killed = start_process(job_uri, command, active_deadline_seconds=10, pending_deadline_seconds=1)
    running(server)
    killed.kill()
    killed.wait()
    wait_until(lambda: any(found["type"] == "Failed" for found in the_job(server)["status"]["conditions"]))
    wait_until(lambda: not pods(server))
    Launcher(job_uri, worker("")).result()
    assert "ended with: training failed: Job " in (said := capfd.readouterr().err)
    assert "has failed because it was active longer than specified deadline" in said


def test_a_job_in_a_queue_that_does_not_exist_says_so_again_and_again(
    server: ApiServer, operator: TrainingOperator, job_uri: str, worker: Make
) -> None:
    with redirect_stderr(io.StringIO()) as screen:
        launcher = Launcher(job_uri, worker(""), queue_name="dcie", pending_deadline_seconds=1)
        wait_until(lambda: "it has no Workload: does Kueue manage PyTorchJobs here?" in screen.getvalue())
        label = {"kueue.x-k8s.io/job-uid": the_job(server)["metadata"]["uid"]}
        server.store.create(WORKLOAD, "default", {"metadata": {"name": "pytorchjob-1", "labels": label}})
        message = "LocalQueue dcie doesn't exist"
        refused = {"type": "QuotaReserved", "status": "False", "reason": "Inadmissible", "message": message}
        status = {"status": {"conditions": [refused]}}
        server.store.patch(WORKLOAD, "default", "pytorchjob-1", status, only_status=True)
        wait_until(
            lambda: screen.getvalue().count(f"admits it (pods.queue_name = 'dcie'); Inadmissible: {message}") > 1
        )
        server.denied.add(("list", "workloads"))
        wait_until(lambda: "its Workload, which says why, cannot be read" in screen.getvalue())
    assert launcher.is_alive()
    name = the_job(server)["metadata"]["name"]
    server.store.patch(JOB, "default", name, {"spec": {"runPolicy": {"suspend": False}}})
    launcher.result()


_FAILS = """
with folder.joinpath("starts").open("a") as stream:
    stream.write("x")
print("[default0]:{error}", flush=True)
sys.exit(1)
"""


def num_starts(job_uri: str) -> int:
    return len(Path(job_uri).with_name("starts").read_text())


def test_a_job_that_the_operator_has_ended_with_such_a_failure_is_final_too(
    server: ApiServer, operator: TrainingOperator, job_uri: str, worker: Make
) -> None:
    command = worker(_FAILS.replace("{error}", "final error: the loss is not finite"))
    with pytest.raises(FinalError, match="the loss is not finite"):
        Launcher(job_uri, command, restart_policy="Never").result()


def test_an_error_that_may_pass_is_tried_again(
    server: ApiServer, operator: TrainingOperator, job_uri: str, worker: Make
) -> None:
    command = worker(_FAILS.replace("{error}", "error: S3 is away"))
    with pytest.raises(LaunchError, match="S3 is away") as caught:
        Launcher(job_uri, command, backoff_limit=2).result()
    assert not isinstance(caught.value, FinalError)
    assert num_starts(job_uri) > 1
