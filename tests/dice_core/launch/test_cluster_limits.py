"""How long and how often a training job may try, on a cluster whose operator counts too; pods are local processes."""

import io
import re
import signal
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from dice_core.launch.backend import FinalError, LaunchError
from dice_core.launch.kubernetes import JobPatience
from tests.kubernetes_api.by_hand import wait_until
from tests.kubernetes_api.controllers import Controllers
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.store import TRAIN_JOB, WORKLOAD, Kind, Object
from tests.launchers import STORED, Launcher, Make, jobs, kind, num_created, pods, running, start_process

pytestmark = pytest.mark.slow

of_any_kind = pytest.mark.parametrize("backend", ["pytorchjob"], indirect=True)
"""Of a test of what does not depend on the kind of the job."""
of_train_jobs = pytest.mark.parametrize("backend", ["trainjob"], indirect=True)
"""Of a test of what the launcher does for a controller that starts no pod again."""


def the_job(server: ApiServer) -> Object:
    [job] = jobs(server)
    return job


@of_any_kind
def test_a_job_that_waits_for_its_pods_keeps_all_its_time_to_train(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
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


@of_any_kind
def test_a_training_that_lasts_too_long_is_ended_with_the_reason_and_its_last_lines(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
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
    wait_until(lambda: not pods(server) and not jobs(server))


def test_the_operator_ends_a_job_that_no_launcher_follows(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    command = worker("time.sleep(300)")
    killed = start_process(job_uri, command, active_deadline_seconds=5, pending_deadline_seconds=1)
    running(server)
    killed.kill()
    killed.wait()
    wait_until(lambda: kind().outcome(the_job(server)) == "Failed")
    wait_until(lambda: not pods(server))
    Launcher(job_uri, worker("")).result()
    ended = "active longer than specified deadline" if kind().is_restarted else "exceeded its active deadline"
    assert re.search(f"ended with: training failed.*: .*{ended}", capfd.readouterr().err)


def test_a_job_in_a_queue_that_does_not_exist_says_so_again_and_again(
    server: ApiServer, operator: Controllers, backend: str, job_uri: str, worker: Make
) -> None:
    with redirect_stderr(io.StringIO()) as screen:
        launcher = Launcher(job_uri, worker(""), queue_name="dcie", pending_deadline_seconds=1)
        wait_until(lambda: f"it has no Workload: does Kueue manage {kind().name}s here?" in screen.getvalue())
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
    admitted: Object = {"suspend": False}
    server.store.patch(STORED[backend], "default", name, {"spec": {**admitted, "runPolicy": admitted}})
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
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    command = worker(_FAILS.replace("{error}", "final error: the loss is not finite"))
    with pytest.raises(FinalError, match="the loss is not finite"):
        Launcher(job_uri, command, restart_policy="Never").result()


@of_train_jobs
def test_a_final_error_starts_no_job_anew_and_one_that_passes_as_many_as_may_be(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    command = worker(_FAILS.replace("{error}", "final error: the loss is not finite"))
    with pytest.raises(FinalError, match="the loss is not finite"):
        Launcher(job_uri, command).result()
    assert num_created(server) == num_starts(job_uri) == 1
    with pytest.raises(LaunchError, match="S3 is away"):
        Launcher(job_uri, worker(_FAILS.replace("{error}", "error: S3 is away")), backoff_limit=1).result()
    assert num_created(server) == num_starts(job_uri) == 3
    assert capfd.readouterr().err.count(": S3 is away; restart 1 of 1, from the newest checkpoint") == 1


def test_a_job_is_made_anew_after_pauses_that_double_up_to_five_minutes() -> None:
    assert [JobPatience().before_restart(number) for number in (1, 2, 3, 5, 6, 50)] == [10, 20, 40, 160, 300, 300]


@of_train_jobs
def test_a_launcher_that_takes_over_a_restarted_job_counts_on(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    body = 'if not folder.joinpath("first").exists():\n    folder.joinpath("first").touch()\n    sys.exit(1)\n'
    body += 'while not folder.joinpath("go").exists():\n    time.sleep(0.05)\nsys.exit(1)'
    killed = start_process(job_uri, worker(body), backoff_limit=1)
    wait_until(lambda: num_created(server) == 2)
    running(server)
    killed.kill()
    killed.wait()
    second = Launcher(job_uri, worker(body), backoff_limit=1)
    Path(job_uri).with_name("go").touch()
    with pytest.raises(LaunchError, match="exit code 1 in dice-"):
        second.result()
    assert num_created(server) == 2


@of_train_jobs
def test_a_launcher_told_to_stop_while_it_makes_a_job_anew_deletes_the_new_one(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_job = server.store.create

    def create(kind: Kind, namespace: str, body: Object) -> Object:
        stored = store_job(kind, namespace, body)
        if kind is TRAIN_JOB and num_created(server) == 2:
            launcher.send_signal(signal.SIGTERM)
            # The answer comes when nobody waits for it any more.
            assert launcher.wait(60) == -signal.SIGTERM
        return stored

    monkeypatch.setattr(server.store, "create", create)
    launcher = start_process(job_uri, worker("sys.exit(1)"))
    wait_until(lambda: launcher.poll() is not None)
    assert num_created(server) == 2
    wait_until(lambda: not jobs(server))


@of_train_jobs
def test_a_job_of_another_kind_that_still_trains_is_refused_and_not_trained_beside(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    killed = start_process(job_uri, worker("time.sleep(300)"))
    running(server)
    killed.kill()
    killed.wait()
    with pytest.raises(LaunchError, match=r"TrainJob dice-.* of an earlier attempt still trains this: set launch"):
        Launcher(job_uri, worker(""), backend="pytorchjob").result()
    assert server.count("POST", "/pytorchjobs") == 0


@of_train_jobs
def test_a_runtime_that_is_not_deployed_is_named(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    with pytest.raises(LaunchError, match=r'trainingruntimes.trainer.kubeflow.org "other" not found: .*preflight'):
        Launcher(job_uri, worker(""), training_runtime="other").result()


def test_an_error_that_may_pass_is_tried_again(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    command = worker(_FAILS.replace("{error}", "error: S3 is away"))
    with pytest.raises(LaunchError, match="S3 is away") as caught:
        Launcher(job_uri, command, backoff_limit=2).result()
    assert not isinstance(caught.value, FinalError)
    # The operator gives up before the last of these tries, the launcher after it.
    assert num_starts(job_uri) in ((2, 3) if kind().is_restarted else (3,))
