"""The part of the Kubeflow Pipelines API that our commands use: kfp's own client, with each fault as one line.

This file knows KFP's pipelines, versions, runs and schedules. submit.py and schedule.py decide what goes into them.
"""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dice_core.launch.connection_errors import innermost, is_authority_unknown, is_certificate_refused
from dice_core.progress import without_password
from pipelines.kfp.http_route import TRUST_HINT, Route, route_to

PROBE_SECONDS = 5
_LOCAL_HOST = "http://localhost:8080"
_HINT = "set KFP_HOST, or: kubectl --namespace {} port-forward service/ml-pipeline-ui 8080:80, for " + _LOCAL_HOST
_PAGE = 50
_BAD_REQUEST = 400
# KFP's words for a run that is not PENDING, RUNNING or PAUSED.
_NOT_STOPPABLE = "Row not found"
_CERTIFICATE_HINT = "set KFP_HOST to the name that the certificate is for, or have it renewed"


class KfpError(RuntimeError):
    """Kubeflow Pipelines cannot do what was asked. The message is one line: the host, the cause, what to do."""


@dataclass(frozen=True)
class Connection:
    """Where Kubeflow Pipelines is, and who asks."""

    host: str
    namespace: str = "kubeflow"
    token: str = ""
    cookies: str = ""

    @classmethod
    def from_environment(cls, host: str = "", namespace: str = "", *, forwarded: str = _LOCAL_HOST) -> "Connection":
        """Fill in what is not given from KFP_HOST, DICE_NAMESPACE, KFP_TOKEN and KFP_COOKIES.

        Args:
            host: as a person gives it. A user and a password in it are left out: KFP's client sends none.
            namespace: of the suite.
            forwarded: the local end of a port-forward, which is taken without any host.

        Raises:
            KfpError: the host is no address of http or https.
        """
        namespace = namespace or os.environ.get("DICE_NAMESPACE") or "kubeflow"
        host = without_password((host or os.environ.get("KFP_HOST") or forwarded).rstrip("/"))
        if not host.startswith(("http://", "https://")):
            raise KfpError(f"KFP_HOST: must start with http:// or https://, got {host!r}")
        try:
            parts = urlsplit(host)
            is_whole = bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_whole = False
        if not is_whole:
            raise KfpError(f"KFP_HOST: must be an address such as {_LOCAL_HOST}, got {host!r}")
        return cls(host, namespace, os.environ.get("KFP_TOKEN", ""), os.environ.get("KFP_COOKIES", ""))


class KfpApi:
    """A connection to one Kubeflow Pipelines. Every method raises KfpError, with one line, when it cannot be used."""

    def __init__(self, connection: Connection) -> None:
        """Connect. The first call asks for the server's health, so that a wrong address fails within seconds.

        Raises:
            KfpError: the server is not reachable, refuses us, or is not Kubeflow Pipelines 2.
        """
        self.host, self._connection = connection.host, connection
        try:
            route = route_to(connection.host)
        except ValueError as error:
            raise KfpError(str(error)) from None
        self.is_multi_user = bool(probe(connection, route).get("multi_user"))
        self._namespace = connection.namespace if self.is_multi_user else None
        with warnings.catch_warnings(), self._explained("connect"):
            warnings.simplefilter("ignore")
            import kfp

            self._client = kfp.Client(
                host=connection.host,
                # Where there is one user, KFP refuses to be told a namespace; its client's default stands for none.
                namespace=self._namespace or "kubeflow",
                existing_token=connection.token or None,
                cookies=connection.cookies or None,
                proxy=route.proxy or None,
                ssl_ca_cert=route.ca_file or None,
            )

    def upload_once(self, pipeline: str, version: str, package: Path, description: str) -> tuple[Any, bool]:
        """Return the version of that name, and whether it had to be uploaded.

        A pipeline that is not there yet is made, with the same description.
        """
        with self._explained(f"upload pipeline {pipeline}"):
            pipeline_id = self._pipeline_id(pipeline, description)
            found = self._client.list_pipeline_versions(pipeline_id, page_size=_PAGE, filter=_named(version))
            if found.pipeline_versions:
                return found.pipeline_versions[0], False
            return (
                self._client.upload_pipeline_version(
                    str(package), version, pipeline_id=pipeline_id, description=description
                ),
                True,
            )

    def _pipeline_id(self, name: str, description: str) -> str:
        found = self._client.list_pipelines(namespace=self._namespace, page_size=_PAGE, filter=_named(name))
        if found.pipelines:
            return str(found.pipelines[0].pipeline_id)
        import kfp_server_api

        # Client.upload_pipeline would give the first version the name of the pipeline.
        pipeline = kfp_server_api.V2beta1Pipeline(display_name=name, description=description, namespace=self._namespace)
        return str(self._client.pipelines.pipeline_service_create_pipeline(pipeline).pipeline_id)

    def experiment(self, name: str) -> str:
        """Return the id of an experiment, which is made if it is not there."""
        with self._explained(f"make experiment {name}"):
            return str(self._client.create_experiment(name, namespace=self._namespace).experiment_id)

    def start_run(
        self, experiment_id: str, name: str, parameters: Mapping[str, Any], version: Any, service_account: str
    ) -> Any:
        """Start a run of a pipeline version and return it."""
        with self._explained(f"start run {name}"):
            return self._client.run_pipeline(
                experiment_id,
                name,
                params=dict(parameters),
                pipeline_id=version.pipeline_id,
                version_id=version.pipeline_version_id,
                service_account=service_account,
            )

    def runs(self, name: str = "") -> list[Any]:
        """Return runs, newest first: those of one name, or the latest of all names."""
        with self._explained("list runs"):
            found = self._client.list_runs(
                page_size=_PAGE,
                sort_by="created_at desc",
                namespace=self._namespace,
                filter=_named(name) if name else None,
            )
            return list(found.runs or ())

    def all_runs(self) -> Iterator[Any]:
        """Yield all runs of all names, newest first."""
        token = ""
        while True:
            with self._explained("list runs"):
                found = self._client.list_runs(
                    page_token=token, page_size=_PAGE, sort_by="created_at desc", namespace=self._namespace
                )
            yield from found.runs or ()
            token = found.next_page_token
            if not token:
                return

    def run(self, run_id: str) -> Any:
        """Return a run with the states of its tasks."""
        with self._explained(f"read run {run_id}"):
            return self._client.get_run(run_id)

    def terminate(self, run_id: str) -> bool:
        """Stop a run; return False if it is being stopped already, or has ended."""
        import kfp_server_api

        with self._explained(f"stop run {run_id}"):
            try:
                self._client.terminate_run(run_id)
            except kfp_server_api.ApiException as error:
                if error.status != _BAD_REQUEST or _NOT_STOPPABLE not in str(error.body):
                    raise
                return False
        return True

    def retry(self, run_id: str) -> None:
        """Continue a run that failed or was stopped, with the tasks that did not succeed; it stays the same run."""
        with self._explained(f"retry run {run_id}"):
            self._client.runs.run_service_retry_run(run_id)

    def pipeline_spec(self, run: Any) -> Mapping[str, Any]:
        """Return the compiled pipeline of a run, or an empty one if KFP does not have it."""
        spec, reference = run.pipeline_spec, run.pipeline_version_reference
        if not spec and reference and reference.pipeline_version_id:
            with self._explained("read the pipeline version"):
                spec = self._client.get_pipeline_version(
                    reference.pipeline_id, reference.pipeline_version_id
                ).pipeline_spec
        spec = spec or {}
        # With a platform part, the pipeline itself is one level down.
        return dict(spec.get("pipeline_spec") or spec)

    def schedules(self, name: str) -> list[Any]:
        """Return the recurring runs of a name."""
        with self._explained("list recurring runs"):
            found = self._client.list_recurring_runs(
                page_size=_PAGE, namespace=self._namespace, filter=_named(name) if name else None
            )
            return list(found.recurring_runs or ())

    def disable_schedule(self, schedule_id: str) -> None:
        """Make a recurring run start nothing more; the run that it has under way goes on."""
        with self._explained("disable a recurring run"):
            self._client.disable_recurring_run(schedule_id)

    def delete_schedule(self, schedule_id: str) -> None:
        """Delete a recurring run. This kills the run that it has under way, for the schedule owns its workflow."""
        with self._explained("delete a recurring run"):
            self._client.delete_recurring_run(schedule_id)

    def create_schedule(self, experiment_id: str, name: str, *, version: Any, **settings: Any) -> Any:
        """Create a recurring run of a pipeline version, with the settings of kfp.Client.create_recurring_run."""
        with self._explained(f"create recurring run {name}"):
            return self._client.create_recurring_run(
                experiment_id,
                name,
                pipeline_id=version.pipeline_id,
                version_id=version.pipeline_version_id,
                **settings,
            )

    def address(self, kind: str, identity: str) -> str:
        """Return the address of the UI's page of a run (`runs`) or a recurring run (`recurringrun`)."""
        ui = without_password(os.environ.get("KFP_UI_HOST", self.host).rstrip("/"))
        return f"{ui}/#/{kind}/details/{identity}"

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn the client's errors into one line, and drop the lines that kfp prints about its work."""
        import kfp_server_api
        import urllib3

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except kfp_server_api.ApiException as error:
            raise KfpError(
                _explain_status(self._connection, action, error.status, error.body or error.reason)
            ) from None
        except (urllib3.exceptions.HTTPError, TimeoutError) as error:
            raise KfpError(f"{self.host}: cannot {action}: {innermost(error)}; is it still reachable?") from None


def probe(connection: Connection, route: Route) -> dict[str, Any]:
    """Return what Kubeflow Pipelines says about its health.

    Raises:
        KfpError: the server is not reachable, refuses us, or is not Kubeflow Pipelines 2.
    """
    import urllib3

    headers = {"Accept": "application/json"}
    headers |= {"Authorization": f"Bearer {connection.token}"} if connection.token else {}
    headers |= {"Cookie": connection.cookies} if connection.cookies else {}
    address, once = f"{connection.host}/apis/v2beta1/healthz", urllib3.Retry(connect=0, read=0, other=0, redirect=3)
    try:
        response = route.pool().request("GET", address, headers=headers, timeout=PROBE_SECONDS, retries=once)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        hint = _HINT.format(connection.namespace)
        if is_certificate_refused(error):
            hint = TRUST_HINT if is_authority_unknown(error) else _CERTIFICATE_HINT
        raise KfpError(f"{connection.host}: cannot be reached ({innermost(error)}): {hint}") from None
    if response.status >= 400:
        raise KfpError(_explain_status(connection, "ask for its health", response.status, response.data))
    try:
        found = json.loads(response.data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise KfpError(
            f"{connection.host}: answers, but not as Kubeflow Pipelines 2 does: a login page, or another service? "
            "Set KFP_TOKEN or KFP_COOKIES, or correct KFP_HOST"
        )
    return found


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _explain_status(connection: Connection, action: str, status: int | None, body: object) -> str:
    remedies = {
        401: "it does not know you: set KFP_TOKEN or KFP_COOKIES",
        403: f"you are not allowed to in namespace {connection.namespace}: ask for the role kubeflow-edit, or set "
        "DICE_NAMESPACE to your own",
        404: "it has no such thing: is this Kubeflow Pipelines 2.15 or newer, and is KFP_HOST without a path?",
    }
    remedy = remedies.get(status or 0, "see the log of deployment ml-pipeline")
    return f"{connection.host}: cannot {action}: HTTP {status}, {_message(body)}; {remedy}"


def _message(body: object) -> str:
    """Return one sentence from the body of an error: KFP's JSON, or the HTML of a proxy before it."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        found = json.loads(text)
        text = str(found.get("message") or found.get("error") or found)
    except (ValueError, AttributeError):
        text = "a page that is not KFP's" if "<" in text else text
    return " ".join(text.split())[:300] or "no reason given"
