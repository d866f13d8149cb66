"""Types of settings that end up in a pod: quantities, tolerations and labels, checked as Kubernetes reads them."""

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_FACTORS = {"m": 1e-3, None: 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_FACTORS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_LABEL = re.compile(r"[A-Za-z0-9](?:[-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_DNS_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
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


def _whole_seconds(value: Any) -> Any:
    """Turn tolerationSeconds back into whole numbers: Kubeflow Pipelines hands every number over as a float."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return value
    return [
        {name: int(field) if isinstance(field, float) and field.is_integer() else field for name, field in item.items()}
        for item in value
    ]


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
Tolerations = Annotated[list[dict[str, Any]], BeforeValidator(_whole_seconds), AfterValidator(_check_tolerations)]
Labels = Annotated[dict[str, str], AfterValidator(_check_labels)]
"""Of pods, or those by which nodes are selected."""
Annotations = Annotated[dict[str, str], AfterValidator(_check_keys)]
