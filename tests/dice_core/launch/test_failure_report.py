"""What a person reads about a training job in trouble; jobs, pods and events as the API has them."""

from typing import Any

from dice_core.launch.failure_report import (
    Line,
    failure_report,
    find_cause,
    is_late,
    stuck_reasons,
    waiting_reasons,
)
from dice_core.launch.pytorchjob import PYTORCH_JOB

_JOB: dict[str, Any] = {"metadata": {"name": "dice-x", "namespace": "ns"}, "spec": {}}


def job(*conditions: tuple[str, str], message: str = "") -> dict[str, Any]:
    listed = [
        {"type": kind, "status": status, "reason": f"Job{kind}", "message": message} for kind, status in conditions
    ]
    return {**_JOB, "status": {"conditions": listed}}


def pod(phase: str = "Pending", *states: dict[str, Any], **status: Any) -> dict[str, Any]:
    containers = [{"name": "pytorch", "restartCount": 0, "state": state} for state in states]
    return {"metadata": {}, "spec": {}, "status": {"phase": phase, "containerStatuses": containers, **status}}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


def ended(exit_code: int, at: str = "2026-01-01T00:00:00Z", reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": exit_code, "finishedAt": at, "reason": reason}}


def said(*texts: str, at: int = 0) -> list[Line]:
    return [Line(("2026-01-01T00:00:00", f"{at + i:09}"), text) for i, text in enumerate(texts)]


def test_only_a_true_succeeded_is_success_and_failed_wins() -> None:
    assert PYTORCH_JOB.outcome(_JOB) == ""
    assert PYTORCH_JOB.outcome(job(("Created", "True"), ("Running", "True"))) == ""
    assert PYTORCH_JOB.outcome(job(("Succeeded", "False"))) == ""
    assert PYTORCH_JOB.outcome(job(("Running", "False"), ("Succeeded", "True"))) == "Succeeded"
    assert PYTORCH_JOB.outcome(job(("Succeeded", "True"), ("Failed", "True"))) == "Failed"
    assert PYTORCH_JOB.is_suspended({"spec": {"runPolicy": {"suspend": True}}})
    assert not PYTORCH_JOB.is_suspended({"spec": {}})


def test_a_pod_that_starts_as_every_pod_does_is_not_stuck() -> None:
    pods = {"a": pod("Pending", waiting("ContainerCreating")), "b": pod("Running", {"running": {}}), "c": pod("Failed")}
    assert stuck_reasons(pods) == []
    assert waiting_reasons(pods, {}, 3, "x") == ["a: Pending"]
    pulling = {"reason": "Pulling", "message": "Pulling image", "type": "Normal"}
    assert waiting_reasons(pods, {"a": [pulling]}, 3, "x") == ["a: Pulling: Pulling image"]


def test_missing_pods_are_explained_by_the_events_of_the_job() -> None:
    assert waiting_reasons({}, {}, 2, "Kubeflow Trainer") == ["2 of 2 pods not created: is Kubeflow Trainer running?"]
    quota = {"reason": "FailedCreatePod", "message": "exceeded quota", "type": "Warning", "count": 7}
    expected = ["2 of 2 pods not created: FailedCreatePod: exceeded quota (7 times)"]
    assert waiting_reasons({}, {"dice-x": [quota]}, 2, "x") == expected


def test_an_init_container_without_its_image_is_stuck_too() -> None:
    starting = pod("Pending", waiting("PodInitializing"))
    starting["status"]["initContainerStatuses"] = [{"state": waiting("ErrImagePull", "not found")}]
    assert stuck_reasons({"w": starting}) == ["w: ErrImagePull: not found"]


def test_the_first_failure_in_time_is_the_cause_not_those_it_caused() -> None:
    pods = {
        "m": pod("Failed", ended(1, "2026-01-01T00:00:09Z")),
        "w": pod("Failed", ended(1, "2026-01-01T00:00:05Z")),
    }
    lines = {
        "rank 0": said("RuntimeError: connection closed by peer", at=8),
        "rank 1": said("ZeroDivisionError: division by zero", at=3),
        "node 0": said("ChildFailedError: ", at=9),
    }
    first, *others = failure_report(job(("Failed", "True"), message="why"), pods, {}, lines).splitlines()
    assert first == "training failed, exit code 1 in w: ZeroDivisionError: division by zero (job ns/dice-x)"
    # torchrun adds nothing where a process has told.
    assert others[-2:] == [
        "[rank 0] RuntimeError: connection closed by peer",
        "[rank 1] ZeroDivisionError: division by zero",
    ]


def test_a_killed_process_is_told_by_torchrun() -> None:
    lines = {
        "rank 0": said("step 7"),
        "node 0": said("  traceback : Signal 9 (SIGKILL) received by PID 77", at=5),
    }
    first, *others = failure_report(job(("Failed", "True")), {"m": pod("Failed", ended(1))}, {}, lines).splitlines()
    assert first == "training failed, exit code 1 in m: Signal 9 (SIGKILL) received by PID 77 (job ns/dice-x)"
    assert others[-1].startswith("[node 0]")


def test_without_logs_the_cause_is_what_the_cluster_says() -> None:
    oom = {"w": pod("Failed", ended(137, reason="OOMKilled"))}
    failed = job(("Failed", "True"), message="1 replica failed")
    assert failure_report(failed, oom, {}, {}).startswith(
        "training failed, exit code 137 (killed) in w: OOMKilled (job"
    )
    lost = {"w": pod("Failed", reason="NodeLost", message="node-7 is gone")}
    assert failure_report(failed, lost, {}, {}).startswith("training failed: w NodeLost: node-7 is gone (job")
    assert failure_report(failed, {}, {}, {}).startswith("training failed: 1 replica failed (job")
    assert failure_report(job(), {}, {}, {}) == "training failed: no reason was given (job ns/dice-x)"


def test_what_the_cluster_did_to_a_pod_is_the_cause_and_not_what_its_processes_say_of_it() -> None:
    torchrun = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15"
    lines = {"rank 1": said("error: the connection was closed by a peer"), "node 0": said(torchrun)}
    failed = job(("Failed", "True"), message="jobset failed due to one or more job failures")
    killed = {"w": pod("Failed", ended(1, reason="OOMKilled")), "m": pod("Failed", ended(1))}
    assert failure_report(failed, killed, {}, lines).startswith("training failed, exit code 1 in m: OOMKilled (job")
    evicted = {"w": pod("Failed", ended(1), reason="Evicted", message="The node was low on resource: memory. ")}
    assert failure_report(failed, evicted, {}, lines).startswith(
        "training failed, exit code 1 in w: w Evicted: The node was low on resource: memory. (job"
    )
    final = {"rank 0": said("final error: the loss is not finite")}
    assert ": the loss is not finite (job" in failure_report(failed, killed, {}, final).splitlines()[0]


def test_a_pod_that_went_is_the_cause_where_none_has_failed() -> None:
    failed = job(("Failed", "True"), message="jobset failed due to one or more job failures")
    pods = {"m": pod("Running", {"running": {}}), "w": pod("Running", {"running": {}})}
    stopped = {"node 0": said("torch.distributed.elastic.SignalException: Process 7 got signal: 15")}
    first = failure_report(failed, pods, {}, stopped, gone=["w", "m"]).splitlines()[0]
    assert first == "training failed: m, w went while it ran: deleted, preempted, or with its node (job ns/dice-x)"


def test_a_deadline_is_the_cause_and_not_the_signals_that_it_sent() -> None:
    lines = {"rank 0": said("torch.distributed.elastic.SignalException: Process 7 got signal: 15")}
    late = job(("Failed", "True"), message="Job x has failed because it was active longer than specified deadline")
    assert is_late(late)
    first = failure_report(late, {"m": pod("Failed", ended(1))}, {}, lines).splitlines()[0]
    assert first.startswith("training failed, exit code 1 in m: Job x has failed because it was active longer than")
    assert failure_report(late, {}, {}, lines, "it was late").startswith("training failed: it was late (job ns/dice-x)")


def test_the_state_of_a_pod_that_waits_says_for_what() -> None:
    message = "0/3 nodes are available"
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    pods = {"a": pod(conditions=[unschedulable]), "b": pod("Pending", waiting("ErrImagePull", "not found"))}
    lines = failure_report(job(("Failed", "True")), pods, {}, {}).splitlines()
    assert lines[-2:] == [f"pod a: Pending, Unschedulable: {message}", "pod b: Pending, ErrImagePull: not found"]


def test_without_logs_the_ends_that_the_kubelet_kept_are_shown() -> None:
    state = ended(1)
    state["terminated"]["message"] = "[default0]:loading\n[default0]:error: no such bucket"
    first, *others = failure_report(job(("Failed", "True")), {"m": pod("Failed", state)}, {}, {}).splitlines()
    assert first == "training failed, exit code 1 in m: no such bucket (job ns/dice-x)"
    assert others[-2:] == ["[m] loading", "[m] error: no such bucket"]


def test_an_error_for_a_person_is_a_better_cause_than_an_exception() -> None:
    assert find_cause(["[rank1]: torch.OutOfMemoryError: CUDA out of memory"]) == (
        "torch.OutOfMemoryError: CUDA out of memory"
    )
    assert find_cause(["ValueError: x", "error: training.max_length: too long"]) == "training.max_length: too long"
    passing_and_final = ["error: S3 is away", "final error: the loss is not finite"]
    assert find_cause(passing_and_final) == "the loss is not finite"
    assert find_cause(["all is well", "an error occurred"]) == ""
