"""A Kubeflow and a cluster that answer as recorded, for the commands that look at a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_objects import NAMESPACE, ClusterObjects, running_cluster
from tests.kfp_api import KfpServer, running_kfp_server
from tests.kfp_recordings import recorded, recorded_pipeline

WORKFLOWS = "/apis/argoproj.io/v1alpha1/namespaces/kubeflow/workflows"
PODS = f"{NAMESPACE}/pods"


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """Answer as Kubeflow Pipelines."""
    with running_kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.host)
        yield server


@pytest.fixture
def workflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    """Answer as a cluster with the suite, without workflows and pods."""
    suite = {"data": {"DICE_ROOT": str(tmp_path / "root")}}
    with running_cluster({WORKFLOWS: [], PODS: [], f"{NAMESPACE}/configmaps/dice-config": suite}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


class Recording:
    """Puts recorded runs into a stand-in, with their pipeline, and with a folder for what they made."""

    def __init__(self, kfp: KfpServer, root: Path) -> None:
        self._kfp, self.root = kfp, root

    def add(self, name: str, pipeline: str = "workflow-retried-succeeded") -> dict[str, Any]:
        """Add a run, and the version of the pipeline that it names; return its row."""
        run = recorded(name)
        run["runtime_config"]["parameters"]["root"] = str(self.root)
        run.setdefault("experiment_id", "e1")
        reference = run["pipeline_version_reference"]
        spec = recorded_pipeline(pipeline)
        inputs = spec["root"]["inputDefinitions"]["parameters"]
        inputs |= {name: {"isOptional": True} for name in run["runtime_config"]["parameters"]}
        version = {**reference, "display_name": "v", "created_at": "2026-01-01T00:00:00Z"}
        self._kfp.versions.append({**version, "pipeline_spec": {"pipeline_spec": spec}})
        self._kfp.experiments.append({"experiment_id": run["experiment_id"], "display_name": "e"})
        self._kfp.runs.append(run)
        return run


@pytest.fixture
def recording(kfp: KfpServer, tmp_path: Path) -> Recording:
    """Return what puts recorded runs into the stand-in."""
    return Recording(kfp, tmp_path / "root")
