"""`WAIT=1`: each change once, what stages at work say, and connections that break."""

from typing import Any

import pytest

from pipelines.kfp.api import Connection, KfpApi, KfpError
from pipelines.kfp.follow import Pace, follow
from pipelines.kfp.run_view import Observer
from tests.cluster_objects import ClusterObjects
from tests.kfp_api import KfpServer
from tests.kfp_recordings import recorded
from tests.pipelines.kfp.conftest import PODS, WORKFLOWS, Recording

pytestmark = pytest.mark.slow

EIGHT = "workflow-eight-shards-under-way"
NODE = "dice-demo-c2j2z(0).root(0).exit-handler-1(0).iteration-1(0).generate-4(0).executor(0)"


def observer(kfp: KfpServer, run_id: str) -> Observer:
    return Observer(KfpApi(Connection(kfp.host)), "kubeflow", "", run_id)


def test_a_change_is_printed_once_with_how_much_is_done(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recording.add("run-eight-shards-under-way", EIGHT)
    workflows.objects[WORKFLOWS] = [recorded(EIGHT)]
    kfp.script = [{}, {}, {"state": "SUCCEEDED"}]
    assert follow(observer(kfp, run["run_id"]), "eight", Pace(poll=0.01)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "/44]" in line]
    assert sum("iteration 1: generate 4 of 8 running" in line for line in lines) == 1
    assert not any("waiting" in line for line in lines)
    assert all("[17/44]" in line for line in lines)


def test_stages_at_work_say_how_far_they_are(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task of hours was silent. The last line that is the stage's own, once as long as it is the same."""
    run = recording.add("run-eight-shards-under-way", EIGHT)
    workflows.objects[WORKFLOWS] = [recorded(EIGHT)]
    labels = {"pipeline/runid": run["run_id"], "app.kubernetes.io/component": "generate"}
    metadata: dict[str, Any] = {"name": "p1", "creationTimestamp": "2026-11-28T23:30:00Z", "labels": labels}
    metadata["labels"]["workflows.argoproj.io/workflow"] = "dice-demo-c2j2z"
    metadata["annotations"] = {"workflows.argoproj.io/node-name": NODE}
    workflows.objects[PODS] = [{"metadata": metadata, "status": {"phase": "Running"}}]
    workflows.objects[f"{PODS}/p1/log"] = (
        "23:31:00 generate shard 4/8: 12 of 28 prompts\n"
        'time="2026-11-28T23:31:00.490Z" level=info msg="sub-process exited" argo=true error="<nil>"\n'
    )
    kfp.script = [{}, {}, {}, {"state": "FAILED"}]
    assert follow(observer(kfp, run["run_id"]), "eight", Pace(poll=0.01, progress=0.0)) == 1
    printed = capsys.readouterr()
    said = "iteration 1: generate 4 of 8: 23:31:00 generate shard 4/8: 12 of 28 prompts"
    assert printed.out.count(said) == 1
    assert "why: make logs RUN=eight; make retry RUN=eight continues it" in printed.err


def test_a_run_that_waits_for_nodes_says_so(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recording.add("run-eight-shards-under-way", EIGHT)
    run["state"] = "PENDING"
    labels = {"pipeline/runid": run["run_id"], "app.kubernetes.io/component": "generate"}
    metadata = {"name": "p1", "creationTimestamp": "2026-11-28T23:30:00Z", "labels": labels}
    reason = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes: too few GPUs",
    }
    workflows.objects[PODS] = [{"metadata": metadata, "status": {"phase": "Pending", "conditions": [reason]}}]
    workflows.objects[WORKFLOWS] = [recorded(EIGHT)]
    kfp.script = [{}, {}, {"state": "SUCCEEDED"}]
    assert follow(observer(kfp, run["run_id"]), "eight", Pace(poll=0.01, progress=0.0)) == 0
    printed = capsys.readouterr().out
    assert printed.count("run: PENDING") == 1
    assert printed.count("generate: does not run yet: ") == 1 and "too few GPUs" in printed


def test_a_connection_that_breaks_for_a_while_is_survived(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recording.add("run-eight-shards-under-way", EIGHT)
    workflows.objects[WORKFLOWS] = [recorded(EIGHT)]
    kfp.script = [{}, {}, {"state": "SUCCEEDED"}]
    watching = observer(kfp, run["run_id"])
    kfp.faults = [None, None, 503, 0, 0, 0, 0, None]
    assert follow(watching, "eight", Pace(poll=0.01)) == 0
    printed = capsys.readouterr()
    assert printed.err.count("trying again") == 1 and "run eight: SUCCEEDED" in printed.out


def test_it_gives_up_in_the_end(kfp: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    watching = observer(kfp, "r")
    kfp.faults = [503] * 10_000
    with pytest.raises(KfpError, match="HTTP 503"):
        follow(watching, "x", Pace(poll=0.01, patience=0.05))
    assert "trying again" in capsys.readouterr().err


def test_a_lost_run_is_not_followed_for_ever(
    recording: Recording, kfp: KfpServer, workflows: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recording.add("run-of-deleted-schedule")
    assert follow(observer(kfp, run["run_id"]), "again", Pace(poll=0.01)) == 1
    assert "run again: lost: its workflow has gone" in capsys.readouterr().out
