"""What every training job carries, whatever its kind: its name, and in its metadata what it trains and was made with.

Pure. The name follows from what is trained, so that a launcher started again finds the job of the one before.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from dice_core.launch.pod_spec import SUITE_LABELS, copied_variables
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.storage import layout

JOB_URI_ANNOTATION = "dice-suite/job-uri"
LAUNCH_ANNOTATION = "dice-suite/launch"
"""The settings that a job was made with, as JSON."""
RESTARTS_ANNOTATION = "dice-suite/restarts"
"""How often the launcher has made the job anew before this one, where nobody else starts it again."""
RUN_LABEL = "dice-suite/run"
"""Of a job that a run started: what a person deletes by."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_TRAIN_JOB_ONLY = "pods.training_runtime"


def job_name(job_uri: str, fingerprint: str, longest: int) -> str:
    """Return the name of a job: the same for the same training, so that a retried launcher finds it.

    Args:
        job_uri: where the job is stored; its last folders make the name readable.
        fingerprint: of what it computes: other settings at the same place are another job.
        longest: how many characters it may have.

    Returns:
        A DNS label that begins with a letter.
    """
    digest = hashlib.sha256(f"{job_uri}\n{fingerprint}".encode()).hexdigest()[:10]
    folders = [part for part in job_uri.partition("://")[2].split("/")[1:-1] or job_uri.split("/")[:-1] if part]
    readable = re.sub(r"[^a-z0-9]+", "-", "-".join(folders[-3:]).lower()).strip("-")
    kept = readable[-(longest - len("dice--") - len(digest)) :].strip("-")
    return "-".join(part for part in ("dice", kept, digest) if part)


def job_metadata(
    name: str,
    job_uri: str,
    launch: LaunchConfig,
    pods: PodConfig,
    environment: Mapping[str, str],
    owner: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the metadata of a job.

    Args:
        name: from job_name.
        job_uri: where what it trains is stored.
        launch: which processes the pods run.
        pods: what the pods look like.
        environment: the launcher's own.
        owner: an ownerReference: deleting that object deletes the job.
    """
    run = layout.run_of(job_uri)
    labels = {**SUITE_LABELS, **({RUN_LABEL: run} if run else {})}
    if pods.queue_name:
        labels[QUEUE_LABEL] = pods.queue_name
    metadata: dict[str, Any] = {
        "name": name,
        "labels": labels,
        "annotations": {JOB_URI_ANNOTATION: job_uri, LAUNCH_ANNOTATION: _made_with(launch, pods, environment)},
    }
    if owner:
        metadata["ownerReferences"] = [dict(owner)]
    return metadata


def differing_settings(job: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that two jobs of one kind were not made alike with."""
    one, two = (
        json.loads(made["metadata"].get("annotations", {}).get(LAUNCH_ANNOTATION, "{}")) for made in (job, other)
    )
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def place_of(job: Mapping[str, Any]) -> str:
    """Return where what a job trains is stored; empty: it is not of this suite."""
    return str((job["metadata"].get("annotations") or {}).get(JOB_URI_ANNOTATION, ""))


def _made_with(launch: LaunchConfig, pods: PodConfig, environment: Mapping[str, str]) -> str:
    sections = {"launch": launch.to_dict(), "pods": pods.to_dict()}
    # The launcher that is stopped decides what becomes of the job, not the one that made it.
    del sections["launch"]["on_cancel"]
    settings = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    if launch.backend != "trainjob":
        # PyTorchJobs that wait were made before there was such a setting.
        del settings[_TRAIN_JOB_ONLY]
    return json.dumps({**settings, "variables of S3": copied_variables(environment)}, sort_keys=True)
