"""Whether preflight tries the pods' S3 server from this machine, and what it says where it cannot."""

import argparse
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dice_core.launch.kubernetes import KubernetesApi
from pipelines.cluster.config import ClusterConfig
from pipelines.preflight.s3 import s3_lines
from tests.cluster_objects import NAMESPACE, running_cluster

pytestmark = pytest.mark.slow

OF_PODS = ClusterConfig()
OF_SECRET = ClusterConfig(credentials_secret="dice-s3")


@pytest.fixture
def check(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("DICE_ROOT", raising=False)

    def run(config: ClusterConfig = OF_PODS, root: str = s3, **deployed: str) -> str:
        data = {"AWS_ENDPOINT_URL": "", "AWS_REGION": "", "DICE_ROOT": root} | deployed
        with running_cluster({f"{NAMESPACE}/configmaps/dice-config": {"data": data}}) as cluster:
            monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
            before = dict(os.environ)
            lines = list(s3_lines(argparse.Namespace(root=""), KubernetesApi("kubeflow"), config))
        assert dict(os.environ) == before, "the environment is as it was"
        return str(lines[-1])

    return run


@pytest.fixture
def no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_the_server_that_the_cluster_was_deployed_with_is_tried(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    line = check(AWS_ENDPOINT_URL=endpoint)
    assert line.startswith(f"ok    S3, from this machine: {endpoint}: put, get, conditional put and delete work")


def test_the_region_that_the_cluster_was_deployed_with_is_used(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    # No server is asked: what is no region is refused as such.
    assert "no region!" in check(AWS_REGION="no region!")


def test_another_server_of_this_shell_is_named_as_such(check: Any) -> None:
    line = check(AWS_ENDPOINT_URL="https://s3.example.com")
    own = os.environ["AWS_ENDPOINT_URL"]
    assert line.startswith(f"ok    S3, from this machine: {own} (this shell's; pods use https://s3.example.com): put")


@pytest.mark.parametrize(("config", "access"), [(OF_PODS, "their service account"), (OF_SECRET, "the secret dice-s3")])
def test_without_credentials_here_nothing_is_said_of_the_pods(
    check: Any, no_keys: None, config: ClusterConfig, access: str
) -> None:
    line = check(config)
    assert line.startswith("?     S3, from this machine: http") and "not tested: s3://" in line
    assert "no credentials: set AWS_ACCESS_KEY_ID" in line and line.endswith(f"Pods have access by {access}")


@pytest.fixture
def denying_server() -> Iterator[str]:
    """Answer every call as S3 answers whoever may not; SeaweedFS lets its one user do everything."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

        def do_PUT(self) -> None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_DELETE = do_PUT

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("config", "state"), [(OF_PODS, "?"), (OF_SECRET, "FAIL")])
def test_keys_here_that_are_denied_fail_only_where_pods_have_the_same(
    check: Any, denying_server: str, config: ClusterConfig, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", denying_server)
    line = check(config, root="s3://dice/x")
    assert line.split()[0] == state and "denies PutObject with these credentials: grant it" in line


@pytest.mark.parametrize(
    ("endpoint", "way"),
    [
        ("http://dice-object-store:8333", "kubectl port-forward service/dice-object-store 8333:8333"),
        ("http://minio.storage.svc:9000", "kubectl --namespace storage port-forward service/minio 8333:9000"),
        ("https://minio.storage.svc.cluster.local", "AWS_ENDPOINT_URL=https://localhost:8333"),
    ],
)
def test_a_server_inside_the_cluster_is_not_looked_for_from_outside(
    check: Any, endpoint: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    line = check(AWS_ENDPOINT_URL=endpoint)
    assert line.startswith(f"?     S3: {endpoint} is inside the cluster") and way in line
