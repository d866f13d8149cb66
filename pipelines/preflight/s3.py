"""Preflight checks of S3: do runs have a root, and can this machine write to it as the pods will?

The check writes one small object and deletes it again.
"""

import argparse
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from urllib.parse import urlsplit

from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.settings.base import ConfigError
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import ConflictError, NoAccessError, StorageError
from pipelines.cluster.config import CONFIG_MAP, ClusterConfig
from pipelines.kfp.submit import chosen_root
from pipelines.preflight.findings import Line, UncertainError, checked

_SHELL_VARIABLES = {
    "AWS_ENDPOINT_URL": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "AWS_REGION": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
"""Settings that the cluster was deployed with, and the variables that override each in this shell."""


def s3_lines(options: argparse.Namespace, cluster: KubernetesApi | None, config: ClusterConfig) -> Iterator[Line]:
    """Yield whether runs have a root, and whether it can be written with the pods' server and region."""
    found = deployed(cluster)
    try:
        root = chosen_root(options.root, lambda: found.get("DICE_ROOT", ""))
    except ConfigError as error:
        yield Line("FAIL", "root", str(error))
        return
    yield Line("ok", "root", root)
    of_shell, of_pods = _of_shell("AWS_ENDPOINT_URL"), found.get("AWS_ENDPOINT_URL", "")
    if _is_inside(of_pods) and not of_shell:
        yield Line("?", "S3", _from_outside(of_pods))
        return
    server = of_shell or of_pods or "AWS"
    if found and of_shell and of_shell != of_pods:
        server += f" (this shell's; pods use {of_pods or 'AWS'})"
    with _as_deployed(found):
        line = checked("S3, from this machine", partial(check_s3, root, config))
    yield replace(line, text=f"{server}: {line.text}")


def deployed(cluster: KubernetesApi | None) -> Mapping[str, str]:
    """Return the settings that the cluster was deployed with; empty if they cannot be read: another check says so."""
    try:
        found = cluster.named("configmaps", CONFIG_MAP) if cluster else None
    except KubernetesError:
        return {}
    return (found or {}).get("data") or {}


def check_s3(root: str, config: ClusterConfig) -> str:
    """Write, read and delete an object, if this machine may.

    Raises:
        UncertainError: this machine has no access, which says nothing about the pods' access.
        StorageError: one of the three failed.
    """
    try:
        return try_writing(root)
    except NoAccessError as error:
        # Keys in this shell are those of the secret, if there is one.
        if config.credentials_secret and os.environ.get("AWS_ACCESS_KEY_ID"):
            raise
        access = f"the secret {config.credentials_secret}" if config.credentials_secret else "their service account"
        raise UncertainError(f"not tested: {error}. Pods have access by {access}") from None


def try_writing(root: str) -> str:
    """Write, read and delete an object. The server must refuse a second writer, or promoting a policy is not safe."""
    storage, key = open_storage(layout.join(root, "preflight")), uuid.uuid4().hex
    storage.write_if_version(key, b"first", None)
    try:
        try:
            storage.write_if_version(key, b"second", None)
        except ConflictError:
            if storage.read_bytes(key) != b"first":
                raise StorageError(f"{root}: an object that was written reads differently") from None
        else:
            raise StorageError(f"{root}: this S3 server ignores conditional writes: two runs could promote at once")
    finally:
        storage.delete(key)
    return f"put, get, conditional put and delete work below {root}"


def _of_shell(name: str) -> str:
    return next((value for variable in _SHELL_VARIABLES[name] if (value := os.environ.get(variable))), "")


@contextmanager
def _as_deployed(found: Mapping[str, str]) -> Iterator[None]:
    """Give this process the pods' server and region, where the shell names none."""
    added = {name: found[name] for name in _SHELL_VARIABLES if found.get(name) and not _of_shell(name)}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _is_inside(endpoint: str) -> bool:
    """Return whether only pods can resolve the server's name, which is that of a service."""
    host = urlsplit(endpoint).hostname or ""
    return bool(host) and ("." not in host or host.endswith((".svc", ".cluster.local")))


def _from_outside(endpoint: str) -> str:
    place = urlsplit(endpoint)
    service, _, domain = (place.hostname or "").partition(".")
    namespace = f"--namespace {domain.partition('.')[0]} " if domain else ""
    port = place.port or (443 if place.scheme == "https" else 80)
    return (
        f"{endpoint} is inside the cluster; to look from here: kubectl {namespace}port-forward service/{service} "
        f"8333:{port}, and AWS_ENDPOINT_URL={place.scheme}://localhost:8333 with the keys of the secret"
    )
