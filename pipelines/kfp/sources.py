"""Sources that a run on a cluster accepts: an address on S3, or a name on the Hub.

The check reads the text alone, before anything is sent. import-model and prepare-data find out whether a source exists,
and know the sources that only a run on this machine accepts (folders, GGUF files).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dice_core.settings.base import ConfigError
from dice_core.storage import layout

_MODELS = ("policy_source", "reference_source", "judge_source", "reward_source")
_NEEDED = ("policy_source", "preferences_source")
# Names of the Hub without an owner (gpt2) are refused as the stages refuse them: all have moved to an owner.
_HUB_MODEL = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_DATA_SET = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:.+)?")
_FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".txt", ".gz", ".zst")
_MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_IN_THE_IMAGE = "pipelines/data/"
_SCHEME = re.compile(r"\w+:/")


def check_sources(parameters: Mapping[str, Any]) -> None:
    """Refuse a source that pods cannot read: it is missing, on this machine, or no valid address.

    Args:
        parameters: of a run. The names of sources end in `_source`.

    Raises:
        ValueError: one line that names the source and what is allowed.
    """
    for name, value in parameters.items():
        if name.endswith("_source"):
            _check(name, value, is_model=name in _MODELS)


def _check(name: str, value: str, *, is_model: bool) -> None:
    on_the_hub = "owner/name" if is_model else "owner/name[@revision][:split]"
    if not value:
        if name in _NEEDED:
            raise ConfigError(f"{name}: is empty, a run needs one: s3://bucket/prefix, or {on_the_hub} on the Hub")
        return
    if value.endswith(".gguf"):
        raise ConfigError(
            f"{name}: pods import no GGUF file, got {value!r}: dice import-model --source FILE brings it from this "
            "machine to s3://, name that"
        )
    is_local = value.startswith((".", "/", "~", "file:"))
    if _SCHEME.match(value) and not is_local:
        layout.check_s3(value, name)
        return
    if not is_model and _is_in_the_image(value):
        return
    if is_local or value.endswith(_FILE_SUFFIXES + _MODEL_SUFFIXES):
        raise ConfigError(
            f"{name}: pods do not see the files of this machine, got {value!r}: copy it to s3://, or name it on "
            f"the Hub ({on_the_hub})"
        )
    if not (_HUB_MODEL if is_model else _HUB_DATA_SET).fullmatch(value):
        raise ConfigError(
            f"{name}: neither an address on S3 (s3://bucket/prefix) nor a name on the Hub ({on_the_hub}), got {value!r}"
        )


def _is_in_the_image(value: str) -> bool:
    return value.startswith(_IN_THE_IMAGE) and (Path(__file__).parents[2] / value).is_file()
