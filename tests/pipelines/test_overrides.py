"""`--set`: what it changes, and what it says to a typo."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.launch.settings import PodConfig
from dice_core.settings.base import ConfigError
from pipelines.cluster.config import ClusterConfig
from pipelines.cluster.training_pods import training_pods
from pipelines.overrides import apply_overrides, find_preset
from pipelines.presets import demo, on_this_machine, zephyr


def test_settings_of_stages_and_of_the_preset_are_changed_together() -> None:
    preset = apply_overrides(zephyr(), ["training.learning_rate=1e-6", "iterations=3", "pairing.length_penalty=grid"])
    assert (preset.training.learning_rate, preset.iterations, preset.pairing.length_penalty) == (1e-6, 3, "grid")


def test_what_is_not_named_stays() -> None:
    changed = apply_overrides(zephyr(), ["training.learning_rate=1e-6"])
    assert dataclasses.replace(changed, training=zephyr().training) == zephyr()


def test_the_later_of_two_wins() -> None:
    assert apply_overrides(zephyr(), ["seed=1", "training.beta=0.5", "seed=2", "training.beta=0.2"]).seed == 2


def test_a_source_may_hold_dots_and_equals_signs() -> None:
    source = "policy_source=/models/a.b=c.gguf"
    assert apply_overrides(zephyr(), [source]).policy_source == "/models/a.b=c.gguf"


def test_lists_and_words_are_read_as_json_where_they_are_json() -> None:
    changed = apply_overrides(zephyr(), ["generation.stop_token_ids=[1,2]", "training.gradient_checkpointing=false"])
    assert changed.generation.stop_token_ids == (1, 2)
    assert changed.training.gradient_checkpointing is False


def test_the_warm_start_has_settings_of_its_own() -> None:
    changed = apply_overrides(demo(), ["warm_start_training.max_steps=3"])
    assert changed.warm_start_training is not None and changed.warm_start_training.max_steps == 3
    assert changed.training == demo().training


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.learnin_rate=1", "training.learnin_rate: unknown setting, did you mean 'learning_rate'?"),
        ("traning.beta=1", "traning.beta: unknown section 'traning', did you mean 'training'?"),
        ("learning_rate=1e-6", "learning_rate: unknown setting, did you mean 'training.learning_rate'?"),
        ("iteration=3", "iteration: unknown setting, did you mean 'iterations'?"),
        ("training.beta=-1", "training.beta: should be greater than 0, got -1"),
        ("training.max_steps=2.5", "training.max_steps: "),
        ("iterations=0", "iterations: must be a whole number from 1, got '0'"),
        ("iterations=two", "iterations: must be a whole number from 1, got 'two'"),
        ("num_shards=", "num_shards: must be a whole number from 1, got ''"),
        ("seed=-1", "seed: must be a whole number from 0, got '-1'"),
        ("training=1", "training: is a section, name a field of it"),
        ("name=other", "name: unknown setting"),
        ("beta", "'beta': must be NAME=VALUE"),
        ("training.beta", "'training.beta': must be "),
        ("warm_start_training.max_steps=3", "unknown section 'warm_start_training'"),
    ],
)
def test_a_wrong_assignment_is_one_line_that_names_it(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        apply_overrides(zephyr(), [assignment])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("section", ["launch", "pods"])
@pytest.mark.parametrize("name", sorted(PodConfig.model_fields.keys() - {"image"}))
def test_a_setting_of_the_training_pods_names_the_one_of_the_cluster_that_decides_it(section: str, name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        apply_overrides(zephyr(), [f"{section}.{name}=1"])
    message = str(raised.value)
    owner = message.partition("did you mean 'cluster.")[2].partition("'? allowed: ")[0]
    assert message.startswith(f"{section}.{name}: unknown se") and owner in ClusterConfig.model_fields


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("cluster.pending_timeout=1h", "cluster.pending_timeout: a run on this machine has no section cluster"),
        ("launch.backend=pytorchjob", "launch.backend: a run on this machine trains with torchrun, got 'pytorchjob'"),
        ("launch.queue_name=dice", "launch.queue_name: unknown setting, allowed: backend, num_nodes,"),
        ("launch.num_nodes=2", "launch: num_nodes must be 1 with backend 'torchrun'"),
    ],
)
def test_a_run_on_this_machine_refuses_what_is_of_a_cluster(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        apply_overrides(on_this_machine(zephyr()), [assignment])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_on_this_machine_trains_in_its_own_processes() -> None:
    preset = apply_overrides(on_this_machine(zephyr()), ["launch.processes_per_node=4"])
    assert (preset.launch.backend, preset.launch.processes_per_node, preset.cluster) == ("torchrun", 4, None)


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=30))
def test_any_text_is_a_change_or_one_line(text: str) -> None:
    try:
        apply_overrides(zephyr(), [text])
    except ConfigError as error:
        assert "\n" not in str(error)


ENDPOINT = [
    "judging.judge=endpoint",
    "judging.endpoint_url=https://a.example/v1",
    "judging.endpoint_model=gpt",
    "judge_source=",
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["judge_source="], "judge_source: is empty, and judging.judge is reward-model: name the judge's model"),
        (
            ENDPOINT,
            "judging.endpoint_key_variable: pods do not get DICE_JUDGE_API_KEY: name the secret that has it, with "
            'cluster.env_secret=NAME cluster.env_secret_keys=["HF_TOKEN","DICE_JUDGE_API_KEY"]',
        ),
        (
            [*ENDPOINT, "cluster.env_secret=keys"],
            'cluster.env_secret=keys cluster.env_secret_keys=["HF_TOKEN","DICE_JUDGE_API_KEY"]',
        ),
        (
            [*ENDPOINT, 'cluster.env={"DICE_JUDGE_API_KEY":"sk-1"}'],
            "cluster.env: DICE_JUDGE_API_KEY is a key: it belongs into a secret",
        ),
    ],
)
def test_a_judge_that_pods_could_not_ask_is_refused_before_anything_is_compiled(
    changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        apply_overrides(zephyr(), changes)
    assert message in str(raised.value) and "\n" not in str(raised.value) and "sk-1" not in str(raised.value)


def test_a_judge_that_pods_can_ask_passes() -> None:
    keys = ["cluster.env_secret=keys", 'cluster.env_secret_keys=["DICE_JUDGE_API_KEY"]']
    assert apply_overrides(zephyr(), [*ENDPOINT, *keys]).judging.judge == "endpoint"
    assert apply_overrides(zephyr(), [*ENDPOINT, "judging.endpoint_key_variable="]).judge_source == ""
    # On this machine the variable is in the environment, or check-settings says that it is not.
    assert apply_overrides(on_this_machine(zephyr()), [*ENDPOINT, "launch.processes_per_node=4"]).cluster is None


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown name 'zefyr', did you mean 'zephyr'"):
        find_preset("zefyr")


def test_a_batch_that_does_not_fit_is_told_of_the_section_it_stands_in() -> None:
    with pytest.raises(ConfigError, match=r"^warm_start_training\.global_batch_size: must be a multiple of"):
        apply_overrides(demo(), ["warm_start_training.global_batch_size=5"])


def test_what_a_trainjob_cannot_do_is_told_of_the_setting_that_was_typed() -> None:
    typed = ["launch.backend=trainjob", "cluster.trainer_priority_class=high"]
    with pytest.raises(
        ConfigError, match=r"^cluster.trainer_priority_class: a TrainJob cannot set it.* in cluster.train"
    ):
        apply_overrides(zephyr(), typed)
    changed = apply_overrides(zephyr(), ["launch.backend=trainjob", "cluster.training_runtime=dice-high"])
    pods = training_pods(changed.launch, changed.cluster)
    assert pods is not None and pods.training_runtime == "dice-high"
