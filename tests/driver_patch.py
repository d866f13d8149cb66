"""The pod-spec-patch that KFP 2.17's driver writes for a task: what Argo keeps four times of each task in its workflow.

Held against a recorded workflow by test_task_size.py; ids and addresses have the length of real ones.
"""

import json
from collections.abc import Mapping
from typing import Any

_ID = "2101b5d5-069d-4876-bb89-089948560fa3"
_BUCKET = "mlpipeline/v2/artifacts"


def driver_patch(
    component: Mapping[str, Any],
    container: Mapping[str, Any],
    platform: Mapping[str, Any],
    *,
    pipeline: str,
    task: str,
    inputs: Mapping[str, Any],
) -> str:
    """Return the JSON text.

    Args:
        component: of the compiled pipeline.
        container: of its executor.
        platform: of its executor too.
        pipeline: its name.
        task: its key.
        inputs: the values of its parameters.
    """
    place = f"{_BUCKET}/{pipeline}/{_ID}/{task}/{_ID}"
    outputs = component.get("outputDefinitions", {})
    logs = {"executor-logs": {"artifactType": {"schemaTitle": "system.Artifact"}}}
    artifacts = {**logs, **outputs.get("artifacts", {})}
    spec = {**component, "outputDefinitions": {**outputs, "artifacts": artifacts}}
    executor_input = {
        "inputs": {"parameterValues": dict(inputs)},
        "outputs": {
            "parameters": {n: {"outputFile": f"/tmp/kfp/outputs/{n}"} for n in outputs.get("parameters", {})},
            "artifacts": {
                name: {"artifacts": [{"name": name, "type": entry["artifactType"], "uri": f"minio://{place}/{name}"}]}
                for name, entry in artifacts.items()
            },
            "outputFile": f"/minio/{place}/output_metadata.json",
        },
    }
    return json.dumps(_pod(container, platform, pipeline, _text(executor_input), _text(spec)), separators=(",", ":"))


def _pod(
    container: Mapping[str, Any], platform: Mapping[str, Any], pipeline: str, executor_input: str, spec: str
) -> dict[str, Any]:
    launcher = ["/kfp-launcher/launch", "--pipeline_name", pipeline, "--run_id", _ID, "--execution_id", "18"]
    launcher += ["--executor_input", executor_input, "--component_spec", spec]
    launcher += ["--pod_name", "$(KFP_POD_NAME)", "--pod_uid", "$(KFP_POD_UID)"]
    launcher += ["--ml_pipeline_server_address", "ml-pipeline.kubeflow.svc.cluster.local"]
    launcher += ["--ml_pipeline_server_port", "8887"]
    launcher += ["--mlmd_server_address", "metadata-grpc-service.kubeflow.svc.cluster.local"]
    launcher += ["--mlmd_server_port", "8080", "--publish_logs", "true", "--publish_logs", "true", "--"]
    names = {"resourceCpuRequest": "cpu", "resourceMemoryRequest": "memory"}
    requests = {short: container["resources"][name] for name, short in names.items()}
    limits = {"memory": container["resources"]["resourceMemoryLimit"]}
    if accelerator := container["resources"].get("accelerator"):
        limits[accelerator["resourceType"]] = accelerator["resourceCount"]
    mounts = [*platform.get("pvcMount", ()), *platform.get("emptyDirMounts", ())]
    context = {"capabilities": {"drop": ["ALL"]}, "runAsUser": 10001, "runAsNonRoot": True}
    volumes = [_volume(mount) for mount in mounts]
    main = {
        "name": "main",
        "image": container["image"],
        "command": launcher,
        "args": [*container["command"], *container["args"]],
        "env": _env(container, platform),
        "resources": {"limits": limits, "requests": requests},
        "volumeMounts": [
            {"name": volume["name"], "mountPath": mount["mountPath"]}
            for volume, mount in zip(volumes, mounts, strict=True)
        ],
        "securityContext": context,
    }
    placed = {name: platform[kfp][key] for kfp, key, name in _PLACED if kfp in platform}
    if "tolerations" in platform:
        placed["tolerations"] = platform["tolerations"]
    return {
        "volumes": volumes,
        "containers": [main],
        **placed,
        "activeDeadlineSeconds": int(platform["activeDeadlineSeconds"]),
    }


_PLACED = (("nodeSelector", "labels", "nodeSelector"),)


def _volume(mount: Mapping[str, Any]) -> dict[str, Any]:
    if "volumeName" in mount:
        details = {"medium": mount.get("medium"), "sizeLimit": mount.get("sizeLimit")}
        return {"name": mount["volumeName"], "emptyDir": {key: value for key, value in details.items() if value}}
    claim = mount.get("constant") or mount["pvcNameParameter"]["runtimeValue"]["constant"]
    return {"name": claim, "persistentVolumeClaim": {"claimName": claim}}


def _env(container: Mapping[str, Any], platform: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = list(container.get("env", ()))
    for kind, source, key, name in (
        ("secretAsEnv", "secretKeyRef", "secretKey", "secretName"),
        ("configMapAsEnv", "configMapKeyRef", "configMapKey", "configMapName"),
    ):
        for entry in platform.get(kind, ()):
            found += (
                {
                    "name": pair["envVar"],
                    "valueFrom": {source: {"name": entry[name], "key": pair[key], "optional": False}},
                }
                for pair in entry["keyToEnv"]
            )
    found += (
        {"name": entry["name"], "valueFrom": {"fieldRef": {"fieldPath": entry["fieldPath"]}}}
        for entry in platform.get("fieldPathAsEnv", ())
    )
    return found


def _text(message: Mapping[str, Any]) -> str:
    """Return JSON as Go's protojson writes it: a space after a comma, none after a colon."""
    return json.dumps(message, separators=(", ", ":"))
