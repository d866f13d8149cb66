"""The launcher against a cluster that runs its pods as local processes, through the faults of a real cluster.

The processes are a few lines, for the sake of time; test_cluster_training.py trains.
"""

import io
import json
import signal
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dice_core.launch.backend import LaunchError
from dice_core.launch.kubernetes import KubernetesApi
from dice_core.launch.pod_logs import PodLogs
from dice_core.launch.pytorchjob import PYTORCH_JOB
from tests.kubernetes_api.by_hand import wait_until
from tests.kubernetes_api.controllers import Controllers
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.store import POD, WORKFLOW, StatusError
from tests.launchers import (
    PATIENCE,
    STORED,
    Launcher,
    Make,
    jobs,
    kind,
    num_created,
    pods,
    publish_result,
    running,
    shown,
    start_process,
)

pytestmark = pytest.mark.slow

of_any_kind = pytest.mark.parametrize("backend", ["pytorchjob"], indirect=True)
"""Of a test of what does not depend on the kind of the job."""

_RECORDED = Path(__file__).parents[2] / "data" / "kfp-2.17.0"

RUNNING = {"name": "pytorch", "restartCount": 0, "state": {"running": {}}}


def pid_file(folder: Path, node: int = 0) -> Path:
    """Wait until a replica has started, and return the file with its process id."""
    path = folder / f"pid-{node}"
    wait_until(lambda: path.exists() and bool(path.read_text()))
    return path


def is_alive(folder: Path, node: int = 0) -> bool:
    status = Path(f"/proc/{pid_file(folder, node).read_text()}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_the_log_of_every_replica_is_shown_with_its_rank(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    body = 'print("torchrun speaks")\nprint(f"[default1]:1 of {node}, one of", os.environ["PET_NPROC_PER_NODE"])'
    # Success is the Master's, and whatever else runs then is cleaned away: let the Worker be first.
    command = worker(f'{body}\ntime.sleep(0 if node == "1" else 1)')
    Launcher(job_uri, command, num_nodes=2, processes_per_node=8).result()
    said = capfd.readouterr().err
    assert shown(said, "node 0") == shown(said, "node 1") == ["torchrun speaks"]
    assert shown(said, "rank 1") == ["1 of 0, one of 8"]
    assert shown(said, "rank 9") == ["1 of 1, one of 8"]


_COUNTING = 'for i in range(60):\n    print("line", i, flush=True)\n    time.sleep(0.03)\n'
_COUNTED = [f"line {i}" for i in range(60)]


@of_any_kind
def test_an_api_server_that_restarts_costs_no_line_and_no_job(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = Launcher(job_uri, worker(_COUNTING))
    running(server)
    for _ in range(2):
        server.restart(0.2)
    launcher.result()
    assert shown(capfd.readouterr().err, "node 0") == _COUNTED
    assert num_created(server) == 1


def test_the_last_words_of_a_container_that_is_started_again_are_shown_and_nothing_twice(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    body = """
if not folder.joinpath("again").exists():
    folder.joinpath("again").touch()
    print("first words", flush=True)
    print("last words", flush=True)
    sys.exit(1)
print("resumed", flush=True)
"""
    # The launcher looks so seldom that both starts lie between two looks.
    operator.kubelet.restart_seconds = 0.0
    Launcher(job_uri, worker(body), patience=replace(PATIENCE, poll=1.5)).result()
    said = capfd.readouterr().err
    assert shown(said, "node 0") == ["first words", "last words", "resumed"]
    assert "may be missing" not in said


@of_any_kind
def test_a_line_is_what_a_newline_ends_and_last_words_need_none(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    body = 'print("10%\\r20%\\rdone", flush=True)\ntime.sleep(1)\nsys.stdout.write("no newline")'
    Launcher(job_uri, worker(body)).result()
    said = capfd.readouterr().err
    assert said.count("[node 0] 10%\r20%\rdone\n") == said.count("[node 0] no newline\n") == 1
    assert "may be missing" not in said


def test_lines_of_one_instant_and_out_of_order_are_shown_once_each(
    server: ApiServer, job_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The runtime reads two streams at once: stamps may be equal, and may go back by a little."""
    answers = [
        "2026-01-01T00:00:01.000000002Z b\n",
        "2026-01-01T00:00:01.000000002Z b\n2026-01-01T00:00:01.000000001Z a\n2026-01-01T00:00:01.000000002Z b\n",
        "2026-01-01T00:00:01.000000001Z a\n2026-01-01T00:00:01.000000002Z b\n2026-01-01T00:00:02.5Z c\n",
    ]
    pod = {"metadata": {"name": "p", "uid": "1"}, "status": {"phase": "Running", "containerStatuses": [RUNNING]}}
    server.store.create(POD, "default", {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "pytorch"}]}})
    logs = PodLogs(KubernetesApi("default"), PYTORCH_JOB, processes_per_node=1)
    for answer in answers:
        server.logs = lambda *_, answer=answer: iter([answer.encode()])
        logs.read([pod])
    assert shown(capfd.readouterr().err, "node 0") == ["b", "a", "b", "c"]


def test_a_container_that_makes_room_between_the_look_at_its_pod_and_at_its_log_loses_no_last_words(
    server: ApiServer, job_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first = ["2026-01-01T00:00:01.1Z begins\n", "2026-01-01T00:00:02.1Z last words\n"]
    second = ["2026-01-01T00:00:03.1Z begins anew\n", "2026-01-01T00:00:04.1Z ends\n"]
    # What the log of the container that runs says at each look, and that of the one before.
    looks = [(first[:1], []), (second[:1], first), (second, first)]
    pod = {"metadata": {"name": "p", "uid": "1"}, "status": {"phase": "Running", "containerStatuses": [RUNNING]}}
    server.store.create(POD, "default", {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "pytorch"}]}})
    logs = PodLogs(KubernetesApi("default"), PYTORCH_JOB, processes_per_node=1)
    for running_log, previous_log in looks:
        by_which = {False: running_log, True: previous_log}
        server.logs = lambda _, __, asked, by_which=by_which: iter(map(str.encode, by_which["previous" in asked]))
        logs.read([pod])
        # The pod that was listed had not been started again yet; the next one has.
        pod["status"]["containerStatuses"] = [{**RUNNING, "restartCount": int(bool(previous_log))}]
    said = capfd.readouterr().err
    assert shown(said, "node 0") == ["begins", "last words", "begins anew", "ends"]
    assert "may be missing" not in said


@of_any_kind
def test_lines_that_went_with_an_old_file_are_said_to_be_missing(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    body = (
        'print("before", flush=True)\nwhile not folder.joinpath("go").exists():\n    time.sleep(0.05)\nprint("after")'
    )
    with redirect_stderr(io.StringIO()) as screen:
        launcher = Launcher(job_uri, worker(body))
        wait_until(lambda: "before" in screen.getvalue())
        [name] = running(server)
        operator.kubelet.rotate(name)
        Path(job_uri).with_name("go").touch()
        launcher.result()
    said = screen.getvalue()
    assert shown(said, "node 0") == ["before", "after"]
    assert said.count(f"log of {name}: its node began a new file; lines after ") == 1


@of_any_kind
def test_a_log_that_may_not_be_read_is_told_once_and_stops_no_training(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    server.denied.add(("get", "pods/log"))
    Launcher(job_uri, worker("time.sleep(0.5)")).result()
    said = capfd.readouterr().err
    assert said.count("it is not shown") == 1 and "403" in said


def test_a_look_costs_two_calls_and_one_a_pod(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    launcher = Launcher(job_uri, worker("time.sleep(1.5)"), patience=replace(PATIENCE, poll=0.2))
    running(server)
    launcher.result()
    assert not [request for request in server.requests if "watch" in request or "follow" in request]
    num_looks = server.count("GET", "/pods?")
    assert server.count("GET", "/log?") <= num_looks
    assert server.count("GET", f"/{kind().plural}/dice-") <= num_looks + 2


_UNTIL_AGAIN = """
if folder.joinpath("again").exists():
    print("resumed")
else:
    folder.joinpath("again").touch()
    time.sleep(60)
"""


def test_an_evicted_pod_is_replaced_and_the_training_goes_on(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    launcher = Launcher(job_uri, worker(_UNTIL_AGAIN))
    [name] = running(server)
    wait_until(lambda: Path(job_uri).with_name("again").exists())
    operator.kubelet.evict(name)
    launcher.result()
    assert shown(capfd.readouterr().err, "node 0") == ["resumed"]
    # Trainer starts no pod again: the launcher makes the job anew.
    assert num_created(server) == (1 if kind().is_restarted else 2)


def test_an_eviction_is_the_cause_where_pods_are_not_replaced(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    launcher = Launcher(job_uri, worker("time.sleep(60)"), restart_policy="Never")
    [name] = running(server)
    operator.kubelet.evict(name)
    with pytest.raises(LaunchError) as caught:
        launcher.result()
    message = f"{name} Evicted: The node was low on resource: memory."
    assert str(caught.value).startswith(f"training failed: {message} (job default/")
    assert f"event of {name}: Evicted: The node was low on resource: memory." in str(caught.value)


def test_a_pod_in_image_pull_backoff_ends_at_the_deadline_and_one_that_recovers_trains(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    operator.kubelet.image_pull_fails = True
    with pytest.raises(LaunchError, match=r'ImagePullBackOff: Back-off pulling image "training:1" \(job'):
        Launcher(job_uri, worker(""), pending_deadline_seconds=1).result()
    wait_until(lambda: not pods(server))

    with redirect_stderr(io.StringIO()) as screen:
        launcher = Launcher(job_uri, worker(""), pending_deadline_seconds=120)
        wait_until(lambda: "ImagePullBackOff" in screen.getvalue())
    operator.kubelet.image_pull_fails = False
    launcher.result()


def test_a_job_deleted_by_hand_ends_the_launcher_and_the_processes(
    server: ApiServer, operator: Controllers, backend: str, job_uri: str, worker: Make, tmp_path: Path
) -> None:
    launcher = Launcher(job_uri, worker("time.sleep(60)"))
    pid_file(tmp_path / "train")
    [job] = jobs(server)
    server.store.delete(STORED[backend], "default", job["metadata"]["name"])
    with pytest.raises(LaunchError, match=f"{kind().name} default/dice-.* was deleted while it ran"):
        launcher.result()
    wait_until(lambda: not is_alive(tmp_path / "train"))


def test_a_deleted_run_takes_its_job_and_the_processes_along(
    server: ApiServer,
    operator: Controllers,
    job_uri: str,
    worker: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workflow = server.store.create(WORKFLOW, "default", {"metadata": {"name": "run-1"}})
    owner = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "name": "run-1",
        "uid": workflow["metadata"]["uid"],
        "controller": True,
    }
    spec = {"containers": [{"name": "main", "image": "core:1", "command": ["sleep", "60"]}]}
    server.store.create(POD, "default", {"metadata": {"name": "launcher", "ownerReferences": [owner]}, "spec": spec})
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("POD_NAME", "launcher")
    monkeypatch.setenv("POD_NAMESPACE", "default")
    launcher = Launcher(job_uri, worker("time.sleep(60)"))
    pid_file(tmp_path / "train")
    server.store.delete(WORKFLOW, "default", "run-1")
    with pytest.raises(LaunchError, match="was deleted while it ran"):
        launcher.result()
    wait_until(lambda: not is_alive(tmp_path / "train"))


def test_a_failed_training_is_an_error_with_its_cause_exit_code_and_last_lines(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    body = 'print(f"[default0]:node {node} at work", flush=True)\ntime.sleep(0.5)\n'
    fails = 'if node == "1":\n    print("[default0]:error: the disk is full")\n    sys.exit(3)\ntime.sleep(60)'
    with pytest.raises(LaunchError) as caught:
        Launcher(job_uri, worker(body + fails), num_nodes=2, restart_policy="Never").result()
    first, *others = str(caught.value).splitlines()
    [job], [failed] = jobs(server), [pod for pod in pods(server) if kind().node_rank(pod) == 1]
    name, pod = job["metadata"]["name"], failed["metadata"]["name"]
    assert first == f"training failed, exit code 3 in {pod}: the disk is full (job default/{name})"
    assert f"pod {pod}: Failed on node-1, exit code 3 (Error)" in others
    assert others[-3:] == ["[rank 0] node 0 at work", "[rank 1] node 1 at work", "[rank 1] error: the disk is full"]


def test_a_restarted_pod_may_succeed_and_one_that_fails_too_often_is_an_error(
    server: ApiServer,
    operator: Controllers,
    backend: str,
    job_uri: str,
    worker: Make,
    capfd: pytest.CaptureFixture[str],
) -> None:
    body = 'attempt = len(list(folder.glob("try-*")))\nfolder.joinpath(f"try-{attempt}").touch()\n'
    body += 'print("attempt", attempt, flush=True)\nsys.exit(attempt < FAILURES)'
    # Longer than a look takes on a busy machine: of two restarts between two looks, the first one's words are lost.
    operator.kubelet.restart_seconds = 4.0
    Launcher(job_uri, worker(body.replace("FAILURES", "2")), backoff_limit=3).result()
    said = capfd.readouterr().err
    assert shown(said, "node 0") == ["attempt 0", "attempt 1", "attempt 2"]
    assert "may be missing" not in said

    for path in Path(job_uri).parent.glob("try-*"):
        path.unlink()
    [job] = jobs(server)
    server.store.delete(STORED[backend], "default", job["metadata"]["name"])
    wait_until(lambda: not pods(server))
    operator.kubelet.restart_seconds = 0.5
    why = "has reached the specified backoff limit" if kind().is_restarted else "exit code 1 in dice-"
    with pytest.raises(LaunchError, match=why):
        Launcher(job_uri, worker(body.replace("FAILURES", "9")), backoff_limit=2).result()
    # The operator gives up before the last of these tries.
    assert len(list(Path(job_uri).parent.glob("try-*"))) in ((2, 3) if kind().is_restarted else (3,))


def test_a_launcher_told_to_stop_ends_the_processes(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, tmp_path: Path
) -> None:
    launcher = start_process(job_uri, worker("time.sleep(60)"))
    pid_file(tmp_path / "train")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == -signal.SIGTERM
    wait_until(lambda: not is_alive(tmp_path / "train"))


def test_a_launcher_told_to_stop_looks_once_at_its_pod_and_deletes_in_one_call(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"containers": [{"name": "main", "image": "core:1", "command": ["sleep", "60"]}]}
    server.store.create(POD, "default", {"metadata": {"name": "launcher"}, "spec": spec})
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("POD_NAME", "launcher")
    monkeypatch.setenv("POD_NAMESPACE", "default")
    # It has looked once, and not again meanwhile.
    launcher = start_process(job_uri, worker("time.sleep(60)"), patience=replace(PATIENCE, poll=60))
    pid_file(Path(job_uri).parent)
    wait_until(lambda: server.count("GET", "/pods?") == 1)
    num_before = len(server.requests)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == -signal.SIGTERM
    [job_name] = {Path(request).name for request in server.requests if request.startswith("DELETE ")}
    assert job_name.startswith("dice-")
    assert [request for request in server.requests[num_before:] if "/log?" not in request] == [
        "GET /api/v1/namespaces/default/pods/launcher",
        f"DELETE /apis/{kind().group}/{kind().version}/namespaces/default/{kind().plural}/{job_name}",
    ]


_STOPPED: dict[str, dict[str, Any]] = {
    "terminated in KFP": {"spec": {"activeDeadlineSeconds": 0}},
    "stopped in Argo": {"spec": {"shutdown": "Terminate"}},
    "being deleted": {"metadata": {"deletionTimestamp": "2026-11-28T23:30:00Z"}},
}


@pytest.fixture
def recorded_run(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Store the workflow of a real run under way and a launcher's pod of it; return the workflow's name."""
    recorded = json.loads((_RECORDED / "workflow-eight-shards-under-way.json").read_text())
    del recorded["metadata"]["namespace"]
    workflow = server.store.create(WORKFLOW, "default", recorded)
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "controller": True, "blockOwnerDeletion": True}
    owner |= {name: workflow["metadata"][name] for name in ("name", "uid")}
    spec = {"containers": [{"name": "main", "image": "core:1", "command": ["sleep", "60"]}]}
    server.store.create(POD, "default", {"metadata": {"name": "launcher", "ownerReferences": [owner]}, "spec": spec})
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("POD_NAME", "launcher")
    monkeypatch.setenv("POD_NAMESPACE", "default")
    return str(owner["name"])


def stop_launcher(job_uri: str, command: tuple[str, ...], prepare: Callable[[], object], **settings: Any) -> str:
    """Start a launcher, prepare, tell it to stop, and return what it said."""
    launcher = start_process(job_uri, command, stderr=subprocess.PIPE, **settings)
    assert launcher.stderr is not None
    pid_file(Path(job_uri).parent)
    prepare()
    launcher.send_signal(signal.SIGTERM)
    with launcher.stderr as lines:
        said = lines.read().decode()
    assert launcher.wait(60) == -signal.SIGTERM
    return said


def test_a_drained_launcher_leaves_its_training_to_the_next_attempt(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, recorded_run: str, tmp_path: Path
) -> None:
    command = worker('while not folder.joinpath("go").exists():\n    time.sleep(0.05)')
    said = stop_launcher(job_uri, command, lambda: None)
    assert f"told to stop; run {recorded_run} goes on: {kind().name} dice-" in said
    assert server.count("DELETE", f"/{kind().plural}/") == 0 and is_alive(tmp_path / "train")

    publish_result(job_uri)
    Path(job_uri).with_name("go").touch()
    Launcher(job_uri, command).result()
    assert num_created(server) == 1


@pytest.mark.parametrize(
    ("why", "on_cancel", "num_left"), [*((why, "delete", 0) for why in _STOPPED), ("terminated in KFP", "leave", 1)]
)
def test_the_launcher_of_a_run_that_is_being_stopped_deletes_or_leaves_its_training(
    server: ApiServer,
    operator: Controllers,
    job_uri: str,
    worker: Make,
    recorded_run: str,
    why: str,
    on_cancel: str,
    num_left: int,
) -> None:
    said = stop_launcher(
        job_uri,
        worker("time.sleep(60)"),
        lambda: server.store.patch(WORKFLOW, "default", recorded_run, _STOPPED[why]),
        on_cancel=on_cancel,
    )
    # A TrainJob stays until its pods are gone.
    wait_until(lambda: len(jobs(server)) == num_left)
    assert ("and so is its run" in said) == (not num_left)
    assert ("launch.on_cancel is 'leave'" in said) == bool(num_left)


def test_a_launcher_that_may_not_look_at_its_run_leaves_its_training_and_says_so(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, recorded_run: str
) -> None:
    said = stop_launcher(job_uri, worker("time.sleep(60)"), lambda: server.denied.add(("get", "workflows")))
    assert "told to stop; whether its run is being stopped cannot be read (403 workflows is forbidden" in said
    assert len(jobs(server)) == 1


@of_any_kind
def test_an_api_that_stays_away_ends_the_launcher_and_not_the_training(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    launcher = Launcher(job_uri, worker("time.sleep(60)"), patience=replace(PATIENCE, give_up=0.5))
    running(server)
    server.stop()
    with pytest.raises(LaunchError, match=r"the Kubernetes API at \S+ has not answered for 0 s: .*refused"):
        launcher.result()
    assert len(running(server)) == 1


@pytest.mark.parametrize(
    ("verb", "resource", "message"),
    [
        ("create", "{jobs}", "the cluster did not take the training job in default: 403 {jobs} is forbidden"),
        ("list", "pods", "may not list pods in default: 403 pods is forbidden"),
    ],
)
def test_a_missing_right_is_named(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, verb: str, resource: str, message: str
) -> None:
    server.denied.add((verb, resource.format(jobs=kind().plural)))
    with pytest.raises(LaunchError, match=message.format(jobs=kind().plural)):
        Launcher(job_uri, worker("time.sleep(60)")).result()


def test_a_job_whose_owner_may_not_be_changed_is_adopted_and_the_log_says_to_whom_it_belongs(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = start_process(job_uri, worker("time.sleep(60)"))
    running(server)
    killed.kill()
    killed.wait()
    spec = {"containers": [{"name": "main", "image": "core:1", "command": ["sleep", "60"]}]}
    server.store.create(POD, "default", {"metadata": {"name": "launcher"}, "spec": spec})
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("POD_NAME", "launcher")
    monkeypatch.setenv("POD_NAMESPACE", "default")
    server.denied.add(("patch", kind().plural))
    with redirect_stderr(io.StringIO()) as screen:
        launcher = Launcher(job_uri, worker("time.sleep(60)"))
        wait_until(lambda: "still belongs to an earlier run, and is deleted with that one: 403" in screen.getvalue())
    launcher.join(1)
    assert launcher.is_alive()


def test_a_quota_that_is_reached_is_not_told_as_a_missing_right(
    server: ApiServer, job_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise StatusError(403, 'pytorchjobs "x" is forbidden: exceeded quota: jobs, requested: count=1, limited: 4')

    monkeypatch.setattr(server.store, "create", refuse)
    with pytest.raises(LaunchError, match=r"exceeded quota: jobs, .* \(raise that quota, or wait\)"):
        Launcher(job_uri).result()


def test_credentials_that_never_worked_are_refused_at_once(server: ApiServer, job_uri: str) -> None:
    server.kubeconfig.write_text(server.kubeconfig.read_text().replace("token: stand-in", "token: another"))
    with pytest.raises(LaunchError, match="401 Unauthorized"):
        Launcher(job_uri).result()
    assert len(server.requests) == 1


def test_a_cluster_without_the_operator_is_an_error_that_says_so(server: ApiServer, backend: str, job_uri: str) -> None:
    server.unserved.add(kind().plural)
    with pytest.raises(LaunchError, match=rf"404 page not found \(is {kind().operator} installed\?"):
        Launcher(job_uri).result()


@of_any_kind
def test_a_role_that_knows_no_other_kind_of_job_stops_no_training(
    server: ApiServer, operator: Controllers, job_uri: str, worker: Make
) -> None:
    server.denied.add(("get", "trainjobs"))
    Launcher(job_uri, worker("")).result()
    assert server.count("GET", "/trainjobs/") == 1
