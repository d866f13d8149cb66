"""MLflow's model registry says what the promoted pointer says: versions by address, nothing is copied.

    alias champion     the version of the promoted policy
    alias challenger   that of a policy that is proposed to a person; there is none while nothing is proposed

The pointer is the truth, and the registry follows it: what an outage has kept from it, the next step or `dice register`
makes up for.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dice_core import __version__
from dice_core.progress import log, one_line
from dice_core.storage.contract import StorageError
from dice_core.storage.promotion import read_promotion, read_promotion_history
from dice_core.storage.promotion_history import History, Number
from dice_core.tracking.mlflow_api import MlflowApi, MlflowError
from dice_core.tracking.mlflow_run import DEFAULT_EXPERIMENT, URI_TAG

CHAMPION, CHALLENGER = "champion", "challenger"
_DIGEST_TAG = "dice.content_digest"
_EXISTS, _MISSING = "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"
_MAX_TAG_CHARACTERS = 5000


@dataclass(frozen=True)
class Registered:
    """What the registry says now."""

    where: str
    """The server."""
    model: str
    champion: str = ""
    """A version; empty: none."""
    challenger: str = ""

    def __str__(self) -> str:
        named = {CHAMPION: self.champion, CHALLENGER: self.challenger}
        versions = [f"{alias} is version {version}" for alias, version in named.items() if version]
        return f"{self.model} in the registry of {self.where}: {', '.join(versions) or 'nothing is promoted'}"


@dataclass(frozen=True)
class _Policy:
    """What a version stands for."""

    uri: str
    content_digest: str
    description: str
    tags: Mapping[str, str]


def register(pointer_uri: str, environment: Mapping[str, str] = os.environ) -> Registered | None:
    """Make the registry say what a pointer says.

    Args:
        pointer_uri: of the promoted policy.
        environment: MLflow's own variables; without MLFLOW_TRACKING_URI nothing happens.

    Returns:
        What it says now; None: there is no registry.

    Raises:
        MlflowError: no answer, or a refusal.
        StorageError: the pointer cannot be read.
    """
    api = MlflowApi.from_environment(environment)
    if api is None:
        return None
    history, promotion = read_promotion_history(pointer_uri), read_promotion(pointer_uri)
    registry = _Registry(api, registered_name(history), environment)
    proposal = history.open_proposal()
    found: dict[str, str] = {CHAMPION: "", CHALLENGER: ""}
    named = {CHAMPION: promotion, CHALLENGER: proposal}
    for alias, policy in named.items():
        if policy is None:
            registry.delete_alias(alias)
        else:
            found[alias] = registry.version_of(_describe(history, policy.policy_uri, policy.content_digest))
            registry.set_alias(alias, found[alias])
    return Registered(api.where, registry.name, found[CHAMPION], found[CHALLENGER])


def register_or_tell(pointer_uri: str, environment: Mapping[str, str] = os.environ) -> str:
    """Make the registry say what a pointer says; a registry that is away stops nobody.

    Returns:
        What it says now, or why it does not; empty where there is none.
    """
    try:
        registered = register(pointer_uri, environment)
    except (MlflowError, StorageError) as error:
        told = f"the model registry does not say so yet: {one_line(error)}: `dice register --pointer {pointer_uri}`"
    else:
        told = "" if registered is None else str(registered)
    if told:
        log(f"mlflow: {told}")
    return told


def registered_name(history: History) -> str:
    """Return what a pointer's model is called in a registry: as its last step says, else as the pointer."""
    names = [entry.registered_model for entry in history.entries if entry.registered_model]
    return names[-1] if names else history.uri.rpartition("/")[2].removesuffix(".json")


def _describe(history: History, uri: str, content_digest: str) -> _Policy:
    entries = [entry for entry in history.entries if entry.content_digest == content_digest]
    tags = {"dice.pointer": history.uri, _DIGEST_TAG: content_digest, "dice.version": __version__}
    if not entries:
        return _Policy(uri, content_digest, "", tags)
    # The first step says on what evidence it came here; a rollback repeats that.
    entry = entries[0]
    facts: dict[str, Number] = {"run": entry.run, "iteration": entry.iteration, "evaluated": entry.evaluated}
    verdict = {f"verdict.{name}": value for name, value in entry.verdict.items()}
    tags |= {f"dice.{name}": str(value) for name, value in {**facts, **verdict}.items() if value not in (None, "")}
    reason = entry.reason or str(entry.verdict.get("reason", ""))
    description = f"iteration {entry.iteration} of run {entry.run}: {reason}" if entry.run else reason
    return _Policy(uri, content_digest, description, tags)


class _Registry:
    """A registered model of a server."""

    def __init__(self, api: MlflowApi, name: str, environment: Mapping[str, str]) -> None:
        self._api, self.name, self._environment = api, name, environment
        try:
            api.post("registered-models/create", name=name)
        except MlflowError as error:
            if error.code != _EXISTS:
                raise

    def version_of(self, policy: _Policy) -> str:
        """Return the version of a policy; made where there is none."""
        for version in self._versions():
            tags = {tag["key"]: tag.get("value", "") for tag in version.get("tags", [])}
            if version.get("source") == policy.uri and tags.get(_DIGEST_TAG) == policy.content_digest:
                return str(version["version"])
        run_id = self._run_of(policy.uri)
        created = self._api.post(
            "model-versions/create",
            name=self.name,
            source=policy.uri,
            description=policy.description,
            tags=[{"key": name, "value": value[:_MAX_TAG_CHARACTERS]} for name, value in policy.tags.items()],
            **({"run_id": run_id} if run_id else {}),
        )
        return str(created["model_version"]["version"])

    def set_alias(self, alias: str, version: str) -> None:
        self._api.post("registered-models/alias", name=self.name, alias=alias, version=version)

    def delete_alias(self, alias: str) -> None:
        try:
            self._api.delete("registered-models/alias", name=self.name, alias=alias)
        except MlflowError as error:
            if error.code != _MISSING:
                raise

    def _versions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            answer = self._api.get(
                "model-versions/search", filter=f"name = '{self.name}'", max_results=200, page_token=token
            )
            found += answer.get("model_versions", [])
            token = answer.get("next_page_token", "")
            if not token:
                return found

    def _run_of(self, uri: str) -> str:
        """Return MLflow's run of the stage that made a policy, where it was tracked there; empty: it was not."""
        experiment = self._environment.get("MLFLOW_EXPERIMENT_ID", "")
        name = self._environment.get("MLFLOW_EXPERIMENT_NAME", "") or DEFAULT_EXPERIMENT
        try:
            if not experiment or "MLFLOW_EXPERIMENT_NAME" in self._environment:
                found = self._api.get("experiments/get-by-name", experiment_name=name)
                experiment = str(found["experiment"]["experiment_id"])
            query = f"tags.`{URI_TAG}` = '{uri}'"
            runs = self._api.post("runs/search", experiment_ids=[experiment], filter=query, max_results=1)
        except MlflowError as error:
            if error.code in (_MISSING, "INVALID_PARAMETER_VALUE"):
                return ""
            raise
        return next((str(run["info"]["run_id"]) for run in runs.get("runs", [])), "")
