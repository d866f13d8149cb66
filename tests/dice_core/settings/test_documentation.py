"""What `--help` says of settings: each one, with its type, default and meaning."""

import pytest

from dice_core.preferences.settings import PairingConfig
from dice_core.settings.documentation import settings_help, type_in_words
from dice_core.stages.table import SECTIONS
from pipelines.cluster.config import ClusterConfig


@pytest.mark.parametrize("kind", [*SECTIONS.values(), ClusterConfig], ids=lambda kind: kind.__name__)
def test_every_setting_says_what_it_means(kind):
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


def test_a_line_has_the_name_as_it_is_typed_the_default_the_type_and_the_meaning_below():
    lines = settings_help({"pairing": PairingConfig}).splitlines()
    at = lines.index("  pairing.replay_ratio=0.5  (float >= 0, <= 1)")
    assert lines[at + 1] == "      gamma: share of offline pairs in the training set."


def test_of_settings_with_values_the_values_are_shown():
    text = settings_help({"pairing": PairingConfig(length_penalty=0.02)})
    assert "  pairing.length_penalty=0.02  (exact or grid or float)" in text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "int >= 1"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "float > 0, <= 1"),
        ({"enum": ["a", "b"], "type": "string"}, "a or b"),
        ({"type": "array", "items": {"type": "integer"}}, "list of int"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "JSON object"),
    ],
)
def test_types_are_words(schema, words):
    assert type_in_words(schema) == words
