"""What a run holds is compared with what it is started with: refused in one message exactly where a stage would refuse.

The run is made by the stages' own functions. They read a model that was skipped, so that each records its settings and
inputs and does no work.
"""

import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dice_core.preferences.settings import ScoringConfig
from dice_core.settings.base import ConfigError
from dice_core.stages.check_settings import check_run, check_settings
from dice_core.stages.evaluate import evaluate
from dice_core.stages.generate import generate
from dice_core.stages.pair import pair
from dice_core.stages.prepare_data import prepare_data
from dice_core.stages.runner import StageContext, run_stage
from dice_core.stages.score import score
from dice_core.stages.table import SCORE, SECTIONS
from dice_core.stages.train import train
from dice_core.storage import layout
from dice_core.storage.contract import StorageError
from dice_core.storage.failures import failures_of_run
from dice_core.storage.manifest import Manifest, publish_files, read_manifest
from dice_core.storage.promotion import promote

CLONED = Path(__file__).parents[2] / "data" / "kfp-2.17.0" / "run-cloned-in-ui-refused.json"
SMALL = {"generation": {"num_responses": 8}, "training": {"global_batch_size": 8, "per_device_batch_size": 2}}
# What trains, and in which pods, is no stage's identity.
COMPARED = [name for name in SECTIONS if name not in ("launch", "pods")]
SETTINGS = [
    pytest.param(section, name, id=f"{section}.{name}")
    for section in COMPARED
    for name in SECTIONS[section].model_fields
]
# Allowed together with another setting only.
COMPANIONS: dict[str, dict[str, Any]] = {
    "warmup_steps": {"lr_scheduler": "constant_with_warmup"},
    "endpoint_max_cost": {"endpoint_input_price": 1.0},
    "margin_share": {"selection": "margin"},
    "lora_alpha": {"lora_rank": 8},
    "lora_dropout": {"lora_rank": 8},
    "lora_target_modules": {"lora_rank": 8},
    "quantize_base": {"lora_rank": 8, "reference_logps": "recompute"},
    "offload_optimizer": {"deepspeed": "zero3"},
}
# An endpoint grades, so that the settings of grading count.
GRADED = {
    "scoring": {"reward": "judge"},
    "grading": {"endpoint_url": "https://b.example/v1", "endpoint_model": "grader", "endpoint_key_variable": ""},
}


@dataclass(frozen=True)
class Start:
    """What a run is started with, as the component hands it over."""

    root: str
    sections: dict[str, Any]
    run: str = "second"
    others: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> dict[str, Any]:
        """Return the parameters that belong to no section."""
        plan = {"num_iterations": 1, "num_shards": 2, "seed": 42, "promote_as": "demo", "policy_source": "org/policy"}
        plan |= {
            "judge_source": "org/judge",
            "reference_source": "",
            "preferences_source": str(Path(self.root) / "pairs.jsonl"),
        }
        return {**plan, "prompts_source": "", "exclude_source": "", **self.others}

    def with_setting(self, section: str, name: str, value: Any) -> "Start":
        return replace(self, sections={**self.sections, section: {**self.sections.get(section, {}), name: value}})

    def with_other(self, name: str, value: Any) -> "Start":
        return replace(self, others={**self.others, name: value})

    def check(self) -> None:
        check_run(self.root, self.run, self.sections, **self.plan())

    def go(self) -> None:
        """Run the stages of the pipeline, in its order and with what its components give them."""
        plan, run = self.plan(), layout.run(self.root, self.run)
        of = {name: self.sections.get(name) for name in SECTIONS}
        policy = import_skipped(self.root, plan["policy_source"])
        sources = {name: plan[name] for name in ("prompts_source", "exclude_source")}
        seed = {"seed": plan["seed"]}
        data = prepare_data(
            plan["preferences_source"],
            layout.data(run),
            policy_uri=policy,
            **sources,
            data=of["data"],
            chat=of["chat"],
            **seed,
        ).uri
        if plan["reference_source"]:
            reference = import_skipped(self.root, plan["reference_source"])
        else:
            place = layout.warm_start(run, "pair")
            pairs = pair(data, policy, place, iteration=0, pairing=of["pairing"], chat=of["chat"], **seed).uri
            place, training = layout.warm_start(run, "train"), of["warm_start_training"]
            chosen = {"training": training, "launch": of["launch"], **base_reference(training, policy)}
            trained = train(policy, pairs, place, iteration=0, **chosen, **seed).uri
            reference, policy = policy, trained
        shards = range(plan["num_shards"])
        places = {n: [layout.shard(run, 1, n, i, len(shards)) for i in shards] for n in ("generate", "score")}
        for i in shards:
            chosen = {"generation": of["generation"], "chat": of["chat"], "shard": i, "num_shards": len(shards)}
            generate(policy, data, places["generate"][i], **chosen, **seed)
            chosen = {"data_uri": data, "scoring": of["scoring"], "grading": of["grading"]}
            score(policy, reference, places["generate"][i], places["score"][i], **chosen, **seed)
        uris = {"scores_uris": places["score"], "responses_uris": places["generate"]}
        place = layout.stage(run, 1, "pair")
        pairs = pair(data, policy, place, **uris, pairing=of["pairing"], chat=of["chat"], **seed).uri
        place = layout.stage(run, 1, "train")
        chosen = {"training": of["training"], "launch": of["launch"], **base_reference(of["training"], reference)}
        trained = train(policy, pairs, place, **chosen, **seed).uri
        pointer = layout.promoted(self.root, plan["promote_as"]) if plan["promote_as"] else ""
        chosen = {name: of[name] for name in ("evaluation", "judging", "generation", "chat")}
        chosen |= {"judge_uri": import_skipped(self.root, plan["judge_source"])} if plan["judge_source"] else {}
        place = layout.stage(run, 1, "evaluate")
        evaluate(trained, policy, reference, data, place, promoted_uri=pointer, **chosen, **seed)

    def is_checked(self) -> bool:
        try:
            self.check()
        except ConfigError as error:
            assert "holds results of other settings" in str(error)
            return False
        return True

    def is_run(self) -> bool:
        try:
            self.go()
        except StorageError as error:
            assert "holds the result of other settings" in str(error)
            return False
        return True


def base_reference(training: dict[str, Any], uri: str) -> dict[str, str]:
    """Return what train_task gives to train beside the policy."""
    return {"reference_uri": uri} if training.get("reference") == "base" else {}


def import_skipped(root: str, source: str) -> str:
    uri = layout.imported_model(root, source)
    if read_manifest(uri) is None:
        # Its content digest is its own: of a skipped stage it is that of the reason.
        publish_files(uri, {}, Manifest(stage="import-model", fingerprint="", files={}, skipped=f"no model {source}"))
    return uri


def write_pairs(path: Path, answer: str = "yes") -> str:
    path.write_text(json.dumps({"prompt": "?", "chosen": answer, "rejected": "no"}))
    return str(path)


def first_start(folder: Path) -> Start:
    write_pairs(folder / "pairs.jsonl")
    return Start(str(folder), {**SMALL, **GRADED, "warm_start_training": {**SMALL["training"], "max_steps": 5}})


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return first_start(tmp_path)


@pytest.fixture
def held(start: Start) -> Start:
    start.go()
    return start


def others(section: str, name: str, value: Any) -> Iterator[Any]:
    """Yield values of a setting that are not the given one, and may be allowed."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        # Twice a replay_ratio of 0.5 is another pipeline.
        yield from (value + 1, value / 2, 2 * value, 0.25, 8)
    elif isinstance(value, list):
        yield from ([*value, 7], [*value, "another"])
    annotation = SECTIONS[section].model_fields[name].annotation
    yield from (word for word in words(annotation) if word != value)
    yield from ("another", "2026-01-31", "https://a.example/v1")


def words(annotation: Any) -> list[Any]:
    inner = typing.get_args(annotation)
    return [word for part in inner for word in ([part] if isinstance(part, str) else words(part))]


def changed(start: Start, section: str, name: str) -> Start:
    """Return a start that differs in one setting."""
    value = check_settings(start.sections)[section].to_dict()[name]
    for companion in COMPANIONS.get(name, {}).items():
        start = start.with_setting(section, *companion)
    for other in others(section, name, value):
        try:
            found = start.with_setting(section, name, other)
            if check_settings(found.sections)[section].to_dict()[name] == value:
                continue
        except ConfigError:
            continue
        return found
    raise AssertionError(f"{section}.{name}: no other value is known to this test")


def test_a_run_that_has_made_nothing_yet_may_have_any_settings(start: Start) -> None:
    start.check()


def test_what_a_run_was_made_with_passes_and_is_written_down(held: Start) -> None:
    held.check()
    record = read_manifest(layout.check_settings(layout.run(held.root, "second")))
    assert record is not None
    assert record.settings["num_iterations"] == 1 and record.settings["training"]["global_batch_size"] == 8
    held.check()


@pytest.fixture(scope="module")
def held_once(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A run that every test of a refusal may ask: it stays as it is."""
    held = first_start(tmp_path_factory.mktemp("held"))
    held.go()
    return held


def test_a_promoted_policy_that_is_gone_is_told_before_anything_runs(start: Start) -> None:
    pointer = layout.promoted(start.root, "demo")
    promote(pointer, f"{start.root}/gone", "0" * 64, evaluated="e", iteration=1)
    with pytest.raises(StorageError, match=r"gone: no manifest.json there"):
        start.check()
    start.with_other("promote_as", "").check()


# Half a minute in all: three pages are written for each setting.
@pytest.mark.slow
@pytest.mark.parametrize(("section", "name"), SETTINGS)
def test_another_setting_is_refused_exactly_where_a_stage_would_refuse_it(
    held_once: Start, section: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the setting is the name of a variable with a key.
    monkeypatch.setenv("another", "key")
    other = changed(held_once, section, name)
    assert other.is_checked() == other.is_run() == (name in SECTIONS[section].operational())


def test_another_judge_is_refused_where_one_has_judged(start: Start) -> None:
    held = start.with_setting("judging", "judge", "reward-model")
    held.go()
    held.check()
    other = held.with_other("judge_source", "org/another")
    with pytest.raises(
        ConfigError, match=r"judge_source was '.*org--judge', now 'org/another' \(iteration-1/evaluate\)"
    ):
        other.check()
    assert not other.is_run()
    # Of a run that nobody has judged the judge may be any.
    replace(other, run="third").check()


@pytest.mark.parametrize(
    ("ratio", "num_shards", "message"),
    [
        (1, 2, "1 trains on offline pairs alone, and this pipeline samples responses: submit one"),
        (0.5, 0, "must be 1 in this pipeline, which samples no response, got 0.5: submit one"),
    ],
)
def test_what_is_sampled_is_used_and_what_is_used_is_sampled(
    start: Start, ratio: float, num_shards: int, message: str
) -> None:
    """Which tasks there are was fixed when the pipeline was compiled; the ratio may be edited in the UI."""
    with pytest.raises(ConfigError, match=rf"^pairing.replay_ratio: {message} with SET='pairing.replay_ratio="):
        start.with_setting("pairing", "replay_ratio", ratio).with_other("num_shards", num_shards).check()
    start.with_setting("pairing", "replay_ratio", 1).with_other("num_shards", 0).check()


def test_how_it_trains_may_differ(held: Start) -> None:
    other = held.with_setting("launch", "processes_per_node", 2).with_setting("training", "logging_steps", 3)
    assert other.is_checked() and other.is_run()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 43, "seed was 42, now 43 (data and 9 more)"),
        ("promote_as", "other", "promote_as was 'demo', now 'other' (iteration-1/evaluate)"),
        ("promote_as", "", "promote_as was 'demo', now '' (iteration-1/evaluate)"),
        ("num_shards", 4, "num_shards was 2, now 4 (iteration-1/pair)"),
        ("policy_source", "org/another", "policy_source was '{root}/models/org--policy', now 'org/another' (data and"),
        (
            "reference_source",
            "org/sft",
            "reference_source was '{root}/models/org--policy', now 'org/sft' (iteration-1/",
        ),
        ("exclude_source", "{root}/pairs.jsonl", "exclude_source was '', now '{root}/pairs.jsonl' (data)"),
    ],
)
def test_what_belongs_to_no_section_is_compared_and_named_too(held: Start, name: str, value: Any, said: str) -> None:
    other = held.with_other(name, value.format(root=held.root) if isinstance(value, str) else value)
    with pytest.raises(ConfigError) as error:
        other.check()
    assert said.format(root=held.root) in str(error.value)
    assert not other.is_run()


def test_more_iterations_go_on_with_what_is_there(held: Start) -> None:
    held.with_other("num_iterations", 3).check()


def test_a_source_of_another_name_is_another_only_if_its_content_is(held: Start) -> None:
    folder = Path(held.root)
    same, other = write_pairs(folder / "same.jsonl"), write_pairs(folder / "other.jsonl", "perhaps")
    held.with_other("preferences_source", same).check()
    with pytest.raises(ConfigError, match=r"preferences_source was '.*pairs.jsonl', now '.*other.jsonl' \(data\)"):
        held.with_other("preferences_source", other).check()
    with pytest.raises(ConfigError, match=r"now '.*gone.jsonl' \(data\)"):
        held.with_other("preferences_source", str(folder / "gone.jsonl")).check()


def test_a_model_of_another_address_and_the_same_content_passes(held: Start) -> None:
    """As the stages let it: they know models by content."""
    reason = read_manifest(layout.imported_model(held.root, "org/policy"))
    assert reason is not None
    publish_files(layout.imported_model(held.root, "mirror/policy"), {}, reason)
    other = held.with_other("policy_source", "mirror/policy")
    assert other.is_checked() and other.is_run()


def test_a_stage_that_was_made_anew_since_is_found_at_those_that_read_it(held: Start) -> None:
    run = layout.run(held.root, "second")
    other = Manifest(stage="train", fingerprint="f", files={}, skipped="made anew")
    publish_files(layout.warm_start(run, "train"), {}, other)
    with pytest.raises(ConfigError, match=r"policy_source was .*warm-start/train.* \(iteration-1/"):
        held.check()


def test_all_differences_are_in_one_line_each_once(held: Start) -> None:
    other = held.with_setting("training", "beta", 0.2).with_setting("pairing", "replay_ratio", 0.1)
    with pytest.raises(ConfigError) as error:
        other.with_other("seed", 7).check()
    said = str(error.value)
    for part in (
        "run second: holds results of other settings: ",
        "training.beta was 0.1, now 0.2 (iteration-1/train)",
        "pairing.replay_ratio was 0.5, now 0.1 (iteration-1/pair and 1 more)",
        "take another run name, or the old values",
    ):
        assert said.count(part) == 1
    assert said.count("seed was") == 1 and "\n" not in said


def test_parts_of_an_interrupted_stage_are_compared_like_a_finished_one(start: Start) -> None:
    run = layout.run(start.root, "second")
    place = layout.shard(run, 1, "score", 0, 2)

    def interrupted(context: StageContext) -> Manifest:
        context.publish_part("part-00000.json", context.write_json([], "part-00000.json"))
        raise KeyboardInterrupt

    def begin(scoring: ScoringConfig) -> None:
        run_stage(SCORE, place, interrupted, settings={"scoring": scoring}, arguments={}, inputs={})

    with pytest.raises(KeyboardInterrupt):
        begin(ScoringConfig(reward="judge"))
    start.check()
    other = start.with_setting("scoring", "max_characters", 5000)
    with pytest.raises(
        ConfigError, match=r"scoring.max_characters was 6699, now 5000 \(iteration-1/score/shard-0-of-2\)"
    ):
        other.check()
    with pytest.raises(StorageError, match="holds parts made with other settings"):
        begin(ScoringConfig(reward="judge", max_characters=5000))
    # Shards of another number of them are begun anew.
    other.with_other("num_shards", 4).check()


def test_results_of_another_form_are_refused_with_their_version(held: Start) -> None:
    place = layout.data(layout.run(held.root, "second"))
    manifest = read_manifest(place)
    assert manifest is not None
    publish_files(place, {}, replace(manifest, fingerprint="0" * 64, package_version="0.0.1"))
    with pytest.raises(ConfigError, match=r"form of the result was 'of version 0.0.1', now 'of version \S+' \(data\)"):
        held.check()


def test_a_refusal_is_left_at_the_run_and_taken_back_by_the_old_values(held: Start) -> None:
    with pytest.raises(ConfigError):
        held.with_other("seed", 43).check()
    [failure] = failures_of_run(layout.run(held.root, "second"))
    assert (failure.title, failure.is_final) == ("check-settings", True)
    assert failure.reason.startswith("run second: holds results of other settings: seed was 42, now 43")
    page = Path(held.root) / "runs" / "second" / "report" / "report.html"
    assert "Check-settings" in page.read_text()
    held.check()
    assert failures_of_run(layout.run(held.root, "second")) == []


def test_an_empty_reference_without_a_warm_start_is_named(start: Start) -> None:
    sections = {name: values for name, values in start.sections.items() if name != "warm_start_training"}
    with pytest.raises(ConfigError, match="reference_source: is empty"):
        replace(start, sections=sections).check()


def test_the_run_that_was_cloned_in_the_ui_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """A person cloned run `second` and changed the learning rate of its training: 1e-5 in place of 2e-5."""
    parameters = json.loads(CLONED.read_text())["runtime_config"]["parameters"]
    known = {name: set(kind.model_fields) for name, kind in SECTIONS.items()}
    sections = {
        # Recorded with an earlier version: settings that have gone or moved since are left out, and pods are not tried.
        name: {key: value for key, value in parameters[name].items() if key in known[name]}
        for name in known.keys() & parameters.keys() - {"launch"}
    }
    write_pairs(tmp_path / "pairs.jsonl")
    others = {name: parameters[name] for name in ("seed", "promote_as")} | {"num_shards": 1, "num_iterations": 2}
    clone = Start(str(tmp_path), sections, parameters["run"], others)
    original = clone.with_setting("training", "learning_rate", 2e-05)
    original.go()
    original.check()
    with pytest.raises(ConfigError) as error:
        clone.check()
    assert str(error.value) == (
        "run second: holds results of other settings: training.learning_rate was 2e-05, now 1e-05 "
        "(iteration-1/train): take another run name, or the old values"
    )
