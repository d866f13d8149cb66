"""A run's settings are checked together before anything runs."""

import pytest

from dice_core.settings.base import ConfigError
from dice_core.stages.check_settings import check_settings
from dice_core.stages.table import SECTIONS
from pipelines.cluster.training_pods import training_pods
from pipelines.presets import PRESETS


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_fits_itself(name):
    preset = PRESETS[name]()
    sections = {key: value.to_dict() for key, value in preset.sections().items() if key in SECTIONS}
    assert sections
    pods = training_pods(preset.launch, preset.cluster)
    assert pods is not None
    check_settings(sections | {"pods": pods.to_dict()})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"bta": 0.1}}, "training.bta: unknown setting, did you mean 'beta'?"),
        ({"sampling": {}}, "sampling: unknown section"),
        ({"generation": {"num_responses": 4}}, "scoring.min_valid_responses: must not exceed .* 4, .* got 8"),
        (
            {"data": {"num_held_out": 8}},
            "evaluation.num_sample_prompts: must not exceed data.num_held_out 8, .* got 16",
        ),
        ({"launch": {"backend": "pytorchjob"}}, "pods.image: backend 'pytorchjob' needs the image"),
        ({"pods": {"image": "x"}}, "launch.backend: 'torchrun' starts no pods, and pods.image is set"),
        ({"launch": {"processes_per_node": 5}}, "training.global_batch_size: must be a multiple of"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(sections, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_settings(sections)
    assert "\n" not in str(error.value)
