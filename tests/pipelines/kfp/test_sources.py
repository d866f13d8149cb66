"""What submit takes as a source, and that the stages take the same of the Hub."""

import os
import subprocess
import sys

import pytest

from dice_core.models.sources import ModelError, find_source
from dice_core.settings.base import ConfigError
from pipelines.dice import default_parameters
from pipelines.kfp.sources import check_sources
from pipelines.presets import PRESETS

MODELS = ["HuggingFaceH4/zephyr-7b-beta", "org/model.v1_2"]
DATA_SETS = ["org/name", "org/name@v1", "org/name@refs/convert/x:default/train", "org/name:train[:100]"]

READ_EACH = """
import sys
from dice_core.data.records import RecordError
from dice_core.data.sources import read_prompts
for source in sys.argv[1:]:
    try:
        read_prompts(source)
    except RecordError as error:
        print(error)
"""


@pytest.mark.parametrize("recurring", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_sources_of_presets_are_taken(preset: str, recurring: bool) -> None:
    check_sources(default_parameters(PRESETS[preset](), recurring=recurring))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_of_the_hub_is_taken_as_import_model_takes_it(model: str) -> None:
    check_sources({"policy_source": model, "reference_source": model})
    assert find_source(model, "").kind == "hub"


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_a_data_set_of_the_hub_is_taken(data_set: str) -> None:
    check_sources({"preferences_source": data_set, "prompts_source": data_set, "exclude_source": data_set})


@pytest.mark.slow
def test_prepare_data_asks_the_hub_for_what_is_taken() -> None:
    """A process of its own, for the Hub's client reads once that it is offline."""
    result = subprocess.run(
        [sys.executable, "-c", READ_EACH, *DATA_SETS],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.count("data set 'org/name' with split") == len(DATA_SETS)


def test_addresses_and_the_data_of_the_images_are_taken() -> None:
    for value in ("s3://bucket/p.jsonl", "s3://bucket/prompts/", "pipelines/data/demo_preferences.jsonl", ""):
        check_sources({"prompts_source": value})
    check_sources({"policy_source": "s3://bucket/models/policy", "reference_source": ""})


@pytest.mark.parametrize("model", ["zephyr7b", "gpt2", "org/name@main", "a/b/c", "org/my model"])
def test_a_name_that_no_model_of_the_hub_has_is_refused_as_import_model_refuses_it(model: str) -> None:
    with pytest.raises(ConfigError, match=r"_source: neither an address on S3 .* \(owner/name\), got"):
        check_sources({"reference_source": model})
    with pytest.raises(ModelError):
        find_source(model, "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("prompts_source=prompts.jsonl", "pods do not see the files of this machine, got 'prompts.jsonl'"),
        ("preferences_source=data/pairs.jsonl", "pods do not see the files of this machine, got 'data/pairs.jsonl'"),
        ("exclude_source=pipelines/data/none.jsonl", "pods do not see the files of this machine"),
        ("policy_source=models/model.safetensors", "pods do not see the files of this machine"),
        ("preferences_source=", "is empty, a run needs one: s3://bucket/prefix, or owner/name[@revision][:split]"),
        ("policy_source=", "is empty, a run needs one: s3://bucket/prefix, or owner/name on the Hub"),
        ("prompts_source=prompts", "neither an address on S3 (s3://bucket/prefix) nor a name on the Hub"),
        ("policy_source=pipelines/data/demo_preferences.jsonl", "pods do not see the files of this machine"),
    ],
)
def test_what_no_pod_can_read_is_one_line(source: str, message: str) -> None:
    name, _, value = source.partition("=")
    with pytest.raises(ConfigError) as caught:
        check_sources({name: value})
    assert str(caught.value).startswith(f"{name}: ") and message in str(caught.value)
