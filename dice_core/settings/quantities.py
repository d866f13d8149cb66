"""Types of settings that end up in a pod: quantities, tolerations and labels, checked as Kubernetes reads them."""

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from dice_core.settings.base import Names

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_FACTORS = {"m": 1e-3, None: 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_FACTORS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_LABEL = re.compile(r"[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_DNS_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_VOLUME_KEYS = {"name", "mount_path", "source"}
_VOLUME_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_CAPABILITY = re.compile(r"[A-Z][A-Z_]*")
POD_VOLUMES = {"tmp": "/tmp", "cache": "/cache", "scratch": "/scratch", "dshm": "/dev/shm"}
"""Volumes that every training pod has, and where."""
_TOLERATION_KEYS = {"key", "operator", "value", "effect", "tolerationSeconds"}
_TOLERATION_WORDS = {
    "operator": ("Equal", "Exists"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}


def quantity(text: str) -> float:
    """Return the number behind a Kubernetes quantity: `16Gi` in bytes, `500m` in CPUs.

    Raises:
        ValueError: not a quantity.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"must be a Kubernetes quantity such as 8, 500m or 64Gi, got {text!r}")
    return float(match[1]) * _FACTORS[match[2]]


def checked(check: Callable[[str], float], *, may_be_empty: bool = False) -> BeforeValidator:
    """Return a validator that keeps the text if the check takes it; a bare number of a command line becomes text."""

    def validate(value: Any) -> Any:
        value = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if isinstance(value, str) and (value or not may_be_empty):
            try:
                check(value)
            except ValueError as error:
                raise _refusal(str(error).partition(", got")[0]) from None
        return value

    return BeforeValidator(validate)


def _refusal(reason: str) -> PydanticCustomError:
    return PydanticCustomError("pod_setting", "{reason}", {"reason": reason})


def _whole_numbers(value: Any) -> Any:
    """Turn numbers such as tolerationSeconds back into whole ones: Kubeflow Pipelines hands all over as floats."""
    if isinstance(value, dict):
        return {name: _whole_numbers(field) for name, field in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_tolerations(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for toleration in value:
        if unknown := set(toleration) - _TOLERATION_KEYS:
            raise _refusal(
                f"a toleration has the keys {', '.join(sorted(_TOLERATION_KEYS))}, and not {', '.join(sorted(unknown))}"
            )
        for name, words in _TOLERATION_WORDS.items():
            if toleration.get(name, words[0]) not in words:
                raise _refusal(f"the {name} of a toleration is {', '.join(words[:-1])} or {words[-1]}")
    return value


def _check_keys(value: dict[str, str]) -> dict[str, str]:
    for key in value:
        prefix, slash, name = key.rpartition("/")
        if not _LABEL.fullmatch(name) or (slash and not _DNS_NAME.fullmatch(prefix)):
            raise _refusal(
                "a key is a name of up to 63 letters, digits, '-', '_' and '.', with a domain and '/' before it or "
                f"without, and not {key!r}"
            )
    return value


def _check_resources(value: dict[str, str]) -> dict[str, str]:
    for name, amount in _check_keys(value).items():
        if name in ("cpu", "memory", "ephemeral-storage"):
            raise _refusal(f"{name} has a setting of its own")
        try:
            quantity(amount)
        except ValueError as error:
            raise _refusal(f"{name} {str(error).partition(', got')[0]}, and not {amount!r}") from None
    return value


def _check_source(value: dict[str, Any]) -> dict[str, Any]:
    if value and (len(value) != 1 or not isinstance(next(iter(value.values())), dict)):
        raise _refusal('a source is one of Kubernetes\' kinds of volumes, such as {"hostPath": {"path": "/mnt/nvme"}}')
    return value


def _check_volumes(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for volume in value:
        if volume.keys() != _VOLUME_KEYS:
            raise _refusal(f"a volume has the keys {', '.join(sorted(_VOLUME_KEYS))}, and not {', '.join(volume)}")
        name, path = volume["name"], volume["mount_path"]
        if not isinstance(name, str) or not _VOLUME_NAME.fullmatch(name) or name in POD_VOLUMES:
            raise _refusal(
                f"the name of a volume has lower-case letters, digits and '-', and is none of {', '.join(POD_VOLUMES)}"
            )
        if not isinstance(path, str) or not path.startswith("/") or path in POD_VOLUMES.values():
            raise _refusal(
                f"the mount_path of a volume begins with '/', and is none of {', '.join(POD_VOLUMES.values())}"
            )
        if not isinstance(volume["source"], dict) or not _check_source(volume["source"]):
            raise _refusal(f'volume {name} needs a source, such as {{"emptyDir": {{}}}}')
    return value


def _check_capabilities(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if not _CAPABILITY.fullmatch(name) or name.startswith("CAP_"):
            raise _refusal(f"a capability is written without CAP_, such as IPC_LOCK, and not {name!r}")
    return value


def _check_labels(value: dict[str, str]) -> dict[str, str]:
    for key, text in _check_keys(value).items():
        if text and not _LABEL.fullmatch(text):
            raise _refusal(
                f"the value of {key} is up to 63 letters, digits, '-', '_' and '.', with a letter or digit at both "
                f"ends, and not {text!r}"
            )
    return value


Quantity = Annotated[str, checked(quantity)]
OptionalQuantity = Annotated[str, checked(quantity, may_be_empty=True)]
Tolerations = Annotated[list[dict[str, Any]], BeforeValidator(_whole_numbers), AfterValidator(_check_tolerations)]
Labels = Annotated[dict[str, str], AfterValidator(_check_labels)]
"""Of pods, or those by which nodes are selected."""
Annotations = Annotated[dict[str, str], AfterValidator(_check_keys)]
Resources = Annotated[dict[str, str], AfterValidator(_check_resources)]
"""Of a device plugin, or huge pages: a name and how many."""
Volumes = Annotated[list[dict[str, Any]], BeforeValidator(_whole_numbers), AfterValidator(_check_volumes)]
"""Each with a name, mount_path, and source as Kubernetes writes it."""
VolumeSource = Annotated[dict[str, Any], BeforeValidator(_whole_numbers), AfterValidator(_check_source)]
Capabilities = Annotated[Names, AfterValidator(_check_capabilities)]
