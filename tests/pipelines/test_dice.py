"""The compiled pipeline: what a cluster gets. Read back from the YAML, as a cluster reads it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from pipelines.dice import DESCRIPTIONS, build_pipeline, default_parameters, run_sections
from pipelines.overrides import apply_overrides
from pipelines.presets import PRESETS, Preset, on_this_machine

pytestmark = pytest.mark.slow

# A workflow is one object of the Kubernetes API, which takes 1.5 MiB; Argo adds to what is compiled.
MAX_YAML_BYTES = 500_000
MAX_PARAMETER_BYTES = 10_000


def compiled(preset: Preset, folder: Path, *, recurring: bool = False) -> dict[str, Any]:
    path = folder / "pipeline.yaml"
    compiler.Compiler().compile(build_pipeline(preset, recurring=recurring), str(path))
    assert path.stat().st_size < MAX_YAML_BYTES
    return dict(next(yaml.safe_load_all(path.read_text())))


@pytest.fixture(scope="module", params=sorted(PRESETS))
def preset(request: pytest.FixtureRequest) -> Preset:
    return PRESETS[request.param]()


@pytest.fixture(scope="module")
def spec(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled(preset, tmp_path_factory.mktemp("compiled"))


def all_tasks(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tasks of all graphs that are work and not graphs themselves."""
    graphs = [spec["root"], *spec["components"].values()]
    tasks = [task for graph in graphs if "dag" in graph for task in graph["dag"]["tasks"].values()]
    return [task for task in tasks if "executorLabel" in spec["components"][task["componentRef"]["name"]]]


def outline(spec: dict[str, Any], dag: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return display names: a graph as a dict, a task as None."""
    found = {}
    for task in (dag or spec["root"])["dag"]["tasks"].values():
        component = spec["components"][task["componentRef"]["name"]]
        found[task["taskInfo"]["name"]] = outline(spec, component) if "dag" in component else None
    return found


def dependencies(spec: dict[str, Any], graph: str) -> dict[str, set[str]]:
    """Return display name -> display names of what a task waits for, in one graph."""
    tasks = spec["components"][graph]["dag"]["tasks"]
    names = {key: task["taskInfo"]["name"] for key, task in tasks.items()}
    return {names[key]: {names[other] for other in task.get("dependentTasks", [])} for key, task in tasks.items()}


def holder(spec: dict[str, Any], reference: str) -> tuple[str, dict[str, Any]]:
    """Return the graph with the one task of a component, and the task."""
    graphs = {name: spec["components"].get(name, spec["root"]) for name in ("root", *spec["components"])}
    (found,) = [
        (name, task)
        for name, graph in graphs.items()
        for task in graph.get("dag", {"tasks": {}})["tasks"].values()
        if task["componentRef"]["name"] == reference
    ]
    return found


def origin(spec: dict[str, Any], reference: str, name: str) -> str:
    """Return where a component's task has an input from, through the graphs around it: `OUTPUT.TASK` or a value."""
    graph, task = holder(spec, reference)
    value = task["inputs"]["parameters"][name]
    if "componentInputParameter" in value:
        given = value["componentInputParameter"]
        return given if graph == "root" else origin(spec, graph, given)
    if "runtimeValue" in value:
        return str(value["runtimeValue"]["constant"])
    return ".".join(value["taskOutputParameter"].values())


def test_the_graph_reads_as_iterations_with_shards_inside(tmp_path: Path) -> None:
    preset = apply_overrides(PRESETS["zephyr"](), ["num_shards=2", "iterations=2"])
    iteration = dict.fromkeys(["generate and score 1 of 2", "generate and score 2 of 2", "pair", "train", "evaluate"])
    start = dict.fromkeys(["check settings", "import policy", "import judge", "prepare data", "import reference"])
    assert outline(compiled(preset, tmp_path)) == {
        "zephyr": start | {"iteration 1": iteration, "if iteration 1 is accepted": {"iteration 2": iteration}},
        "report": None,
    }


def test_an_sft_model_gets_a_warm_start_and_no_reference(tmp_path: Path) -> None:
    spec = compiled(PRESETS["demo"](), tmp_path)
    assert {"warm start: pair", "warm start: train"} <= set(outline(spec)["demo"])
    assert "reference_source" not in spec["root"]["inputDefinitions"]["parameters"]
    waits = dependencies(spec, "comp-exit-handler-1")
    assert waits["warm start: pair"] == {"check settings", "prepare data"}
    assert waits["warm start: train"] == {"check settings", "warm start: pair"}
    assert waits["iteration 1"] == {"check settings", "import policy", "warm start: train"}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_key_stands_once_in_the_whole_pipeline(preset: str, tmp_path: Path) -> None:
    """KFP's UI finds the artifacts of a task by its key: iteration 2's stood in the layer of iteration 1."""
    spec = compiled(PRESETS[preset](), tmp_path)
    graphs = [spec["root"], *spec["components"].values()]
    keys = [key for graph in graphs if "dag" in graph for key in graph["dag"]["tasks"]]
    assert len(keys) == len(set(keys))
    assert {"iteration-1-train", "iteration-2-evaluate"} <= set(keys)
    assert ("iteration-2-generate-and-score-1" in keys) != PRESETS[preset]().is_offline


def test_stages_wait_for_what_they_read(tmp_path: Path) -> None:
    spec = compiled(apply_overrides(PRESETS["zephyr"](), ["num_shards=2"]), tmp_path)
    assert dependencies(spec, "comp-iteration-2") == {
        "generate and score 1 of 2": set(),
        "generate and score 2 of 2": set(),
        "pair": {"generate and score 1 of 2", "generate and score 2 of 2"},
        "train": {"pair"},
        "evaluate": {"train"},
    }
    waits = dependencies(spec, "comp-exit-handler-1")
    assert waits["prepare data"] == {"check settings", "import policy"}
    assert waits["import judge"] == {"check settings"}
    first = {"check settings", "import policy", "import reference", "import judge", "prepare data"}
    assert waits["iteration 1"] == first


def test_a_task_gets_the_address_of_the_settings_and_its_place_alone(spec: dict[str, Any]) -> None:
    """An address more is 150 bytes of each task in a workflow, several times: the place says where it reads."""
    for task in all_tasks(spec):
        given = task["inputs"]["parameters"]
        if task["componentRef"]["name"] in ("comp-check-settings", "comp-report"):
            continue
        names = {"settings_uri", "role" if task["componentRef"]["name"].startswith("comp-import") else "place"}
        assert given.keys() == names
        outputs = spec["components"][task["componentRef"]["name"]]["outputDefinitions"].get("parameters", {})
        assert set(outputs) <= {"decision"}


@pytest.mark.parametrize("name", ["zephyr-offline", "zephyr-offline-new-reference"])
def test_offline_pairs_alone_sample_nothing_and_read_the_gate_themselves(name: str, tmp_path: Path) -> None:
    spec = compiled(PRESETS[name](), tmp_path)
    iteration = dict.fromkeys(["pair", "train", "evaluate"])
    found = outline(spec)[name]
    assert found["iteration 1"] == found["if iteration 1 is accepted"]["iteration 2"] == iteration
    assert dependencies(spec, "comp-iteration-2") == {"pair": set(), "train": {"pair"}, "evaluate": {"train"}}
    assert holder(spec, "comp-check-settings")[1]["inputs"]["parameters"]["num_shards"] == {
        "runtimeValue": {"constant": 0.0}
    }


def test_a_model_of_rewards_is_imported_before_the_stage_that_ranks(tmp_path: Path) -> None:
    changes = ["num_shards=1", "reward_source=org/reward", "scoring.reward=reward-model"]
    spec = compiled(apply_overrides(PRESETS["zephyr"](), changes), tmp_path)
    assert "import reward" in dependencies(spec, "comp-exit-handler-1")["iteration 1"]


@pytest.mark.parametrize("recurring", [False, True])
def test_on_a_cluster_an_iteration_starts_only_when_the_one_before_it_was_accepted(
    recurring: bool, tmp_path: Path
) -> None:
    """Else a refused gate costs a pod of the next iteration for each task, to say that it was skipped."""
    preset = apply_overrides(PRESETS["zephyr"](), ["iterations=3", "num_shards=1"])
    spec = compiled(preset, tmp_path, recurring=recurring)
    assert holder(spec, "comp-iteration-1")[0] == "comp-exit-handler-1"
    for number in (1, 2):
        branch, _ = holder(spec, f"comp-iteration-{number + 1}")
        graph, condition = holder(spec, branch)
        # The next condition is inside this one: its iteration has to run for there to be a decision.
        assert graph == holder(spec, f"comp-iteration-{number}")[0]
        decision = f"pipelinechannel--iteration-{number}-decision"
        assert condition["triggerPolicy"] == {"condition": f"inputs.parameter_values['{decision}'] == 'accepted'"}
        assert f"iteration-{number}" in condition["dependentTasks"]
        assert origin(spec, branch, decision) == f"decision.iteration-{number}"
        iteration = spec["components"][f"comp-iteration-{number}"]
        assert iteration["outputDefinitions"]["parameters"]["decision"] == {"parameterType": "STRING"}
        handed_on = iteration["dag"]["outputs"]["parameters"]["decision"]["valueFromParameter"]
        assert handed_on == {"outputParameterKey": "decision", "producerSubtask": f"iteration-{number}-evaluate"}


def test_what_this_machine_runs_has_no_condition(tmp_path: Path) -> None:
    """kfp.local would skip the branch whatever evaluate returns; the stages read the gate themselves."""
    spec = compiled(on_this_machine(PRESETS["demo"]()), tmp_path)
    assert {"iteration 1", "iteration 2"} < outline(spec)["demo"].keys()
    assert "iteration 1" in dependencies(spec, "comp-exit-handler-1")["iteration 2"]
    assert not [name for name in spec["components"] if name.startswith("comp-condition")]


@pytest.mark.parametrize("recurring", [False, True])
def test_what_the_run_holds_is_compared_with_what_its_stages_will_get(recurring: bool, tmp_path: Path) -> None:
    """Under the name, and with the policy, reference and prompts, that a recurring run has chosen."""
    preset = apply_overrides(PRESETS["zephyr"](), ["iterations=3", "num_shards=4"])
    spec = compiled(preset, tmp_path, recurring=recurring)
    parameters = holder(spec, "comp-check-settings")[1]["inputs"]["parameters"]
    given = ("root", "seed", "promote_as", "preferences_source", "exclude_source", *run_sections(preset))
    for name in given:
        assert parameters[name] == {"componentInputParameter": f"pipelinechannel--{name}"}
    for name in ("run", "policy_source", "reference_source", "prompts_source"):
        source = parameters[name]
        chosen = {"taskOutputParameter": {"outputParameterKey": name, "producerTask": "choose-inputs"}}
        assert source == (chosen if recurring else {"componentInputParameter": f"pipelinechannel--{name}"})
    constants = {"num_iterations": 3, "num_shards": 4, "service_account": "dice-pipeline"}
    assert {name: parameters[name]["runtimeValue"]["constant"] for name in constants} == constants


def test_a_run_on_this_machine_asks_for_no_account_and_one_with_a_warm_start_for_no_reference(tmp_path: Path) -> None:
    spec = compiled(on_this_machine(PRESETS["demo"]()), tmp_path)
    parameters = holder(spec, "comp-check-settings")[1]["inputs"]["parameters"]
    for name in ("service_account", "reference_source"):
        assert parameters[name]["runtimeValue"]["constant"] == ""


def test_the_report_is_written_whatever_happened(spec: dict[str, Any]) -> None:
    assert spec["root"]["dag"]["tasks"]["report"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_no_task_takes_a_cached_result(spec: dict[str, Any]) -> None:
    assert len(all_tasks(spec)) >= 11
    assert [task for task in all_tasks(spec) if task["cachingOptions"]] == []


def test_defaults_come_back_as_the_settings_they_were(spec: dict[str, Any], preset: Preset) -> None:
    """kfp hands every number over as a float; the settings classes take integral ones where an integer belongs."""
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    for name, settings in run_sections(preset).items():
        assert any(isinstance(value, float) for value in parameters[name]["defaultValue"].values())
        assert type(settings).parse(parameters[name]["defaultValue"], name) == settings


def test_every_parameter_is_described_and_only_the_root_is_required(spec: dict[str, Any], preset: Preset) -> None:
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert [name for name, entry in parameters.items() if not entry.get("isOptional")] == ["root"]
    assert {name: entry["description"] for name, entry in parameters.items()} == {
        name: DESCRIPTIONS[name] for name in ("root", *default_parameters(preset))
    }


def test_parameters_fit_into_what_kfp_allows(spec: dict[str, Any]) -> None:
    sizes = [len(str(entry.get("defaultValue"))) for entry in spec["root"]["inputDefinitions"]["parameters"].values()]
    assert max(sizes) < MAX_PARAMETER_BYTES / 4


@pytest.mark.parametrize("name", list(PRESETS))
def test_any_preset_begins_with_a_warm_start_when_it_has_no_reference(name: str, tmp_path: Path) -> None:
    spec = compiled(apply_overrides(PRESETS[name](), ["reference_source="]), tmp_path)
    assert "warm_start_training" in spec["root"]["inputDefinitions"]["parameters"]


@pytest.mark.parametrize("preset", ["zephyr", "demo"])
def test_a_run_without_a_name_is_named_once_for_all_of_its_tasks(preset: str, tmp_path: Path) -> None:
    """By check-settings, after the run's id; the report, which waits for no task, names it by the same."""
    spec = compiled(apply_overrides(PRESETS[preset](), ["num_shards=1"]), tmp_path)
    assert spec["root"]["inputDefinitions"]["parameters"]["run"].get("defaultValue", "") == ""
    named = {reference for reference in spec["components"] if takes_run(spec, reference)}
    assert named == {"comp-check-settings", "comp-report"}
    for task in ("check-settings", "report"):
        assert origin(spec, f"comp-{task}", "run") == "run"
        assert origin(spec, f"comp-{task}", "job_id") == "{{$.pipeline_job_uuid}}"
        assert origin(spec, f"comp-{task}", "promote_as") == "promote_as"
    assert default_parameters(PRESETS[preset](), recurring=True)["run"] == preset


def takes_run(spec: dict[str, Any], reference: str) -> bool:
    component = spec["components"][reference]
    return "executorLabel" in component and "run" in component["inputDefinitions"]["parameters"]
