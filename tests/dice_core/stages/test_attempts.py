"""A failed attempt leaves its reason, a final one is not repeated by its workflow, and the page of the run says it."""

import inspect
import json
from pathlib import Path

import pytest

from dice_core.data.records import RecordError
from dice_core.launch.backend import FinalError, LaunchError
from dice_core.models.files import ModelError
from dice_core.settings.base import ConfigError
from dice_core.stages.attempts import RepeatError, is_final, leaves_reason
from dice_core.stages.choose_inputs import choose_inputs
from dice_core.stages.generate import generate
from dice_core.stages.import_model import import_model
from dice_core.stages.prepare_data import prepare_data
from dice_core.stages.runner import StageReport
from dice_core.stages.table import ALPACA_EVAL, EVALUATE, IMPORT_MODEL, REPORT, STAGES, TRAIN
from dice_core.storage import layout
from dice_core.storage.contract import MissingObjectError, NoAccessError, StorageError
from dice_core.storage.failures import failures_of_run, read_failure
from dice_core.storage.manifest import Manifest, publish_files

NODE = "dice-demo-4r7mm(0).root(0).exit-handler-1(0).iteration-1(0).train(0).executor"


class Stage:
    """A stage whose next attempts end as told, and which counts those that were made."""

    def __init__(self, root: Path, stage=TRAIN):
        self.uri = layout.stage(layout.run(str(root), "second"), 1, stage.name)
        self.num_made, self.outcome = 0, None
        self.function = leaves_reason(stage)(self._work)

    def _work(self, output_uri: str) -> StageReport:
        self.num_made += 1
        if self.outcome is not None:
            raise self.outcome
        return StageReport(output_uri, "completed", {})

    def attempt(self, outcome: BaseException | None = None) -> StageReport:
        self.outcome = outcome
        return self.function(self.uri)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.fixture
def in_pod(monkeypatch):
    def enter(node: str, pod: str = "pod-1") -> None:
        monkeypatch.setenv("ARGO_NODE_NAME", node)
        monkeypatch.setenv("KFP_POD_NAME", pod)

    return enter


FINAL = [
    ConfigError("training.beta: too high"),
    RecordError("pairs.parquet: no column chosen"),
    MissingObjectError("s3://b/x: no such object"),
    FinalError("training failed: the loss is not finite"),
    ModelError("m: is pickle"),
    ImportError("vllm"),
]
PASSING = [
    StorageError("s3://b: cannot reach http://s3"),
    NoAccessError("s3://b: denied"),
    LaunchError("training failed, exit code 137 (killed)"),
    MemoryError(),
    OSError(28, "No space left on device"),
    # What libraries raise may be about anything, such as memory that another process still holds.
    ValueError("No available memory for the cache blocks"),
    RuntimeError("CUDA error"),
]


@pytest.mark.parametrize("error", FINAL, ids=lambda error: type(error).__name__)
def test_what_a_person_has_to_change_is_final(error):
    assert is_final(error)


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_what_may_pass_is_not_final(error):
    assert not is_final(error)


def test_a_model_that_a_disk_or_the_hub_failed_to_give_may_come_another_time():
    def made_from(cause: Exception) -> ModelError:
        try:
            try:
                raise cause
            except Exception:
                raise ModelError("m: cannot be loaded") from None
        except ModelError as error:
            return error

    assert not is_final(made_from(ConnectionError("timed out")))
    assert not is_final(made_from(RuntimeError("CUDA out of memory")))
    assert is_final(made_from(KeyError("lm_head.weight")))


def test_a_failed_attempt_leaves_what_where_and_when(stage, in_pod):
    in_pod(f"{NODE}(1)", "dice-demo-4r7mm-318")
    with pytest.raises(LaunchError):
        stage.attempt(LaunchError("training failed, exit code 1: the disk is full (job a/b)\n[rank 0] more"))
    found = read_failure(stage.uri)
    assert found.reason == "training failed, exit code 1: the disk is full (job a/b)"
    assert (found.stage, found.attempt, found.pod, found.is_final) == ("train", 2, "dice-demo-4r7mm-318", False)
    assert found.time.endswith("Z") and len(found.time) == 20


def test_an_attempt_that_completes_takes_the_reason_back(stage):
    with pytest.raises(StorageError):
        stage.attempt(StorageError("cannot reach"))
    assert stage.attempt().status == "completed"
    assert read_failure(stage.uri) is None


def test_what_an_older_attempt_says_while_a_newer_one_completes_does_not_stay(tmp_path):
    """The pod of an evicted attempt may live on."""
    older = Stage(tmp_path)

    @leaves_reason(TRAIN)
    def newer(output_uri: str) -> StageReport:
        with pytest.raises(StorageError):
            older.attempt(StorageError("cannot reach"))
        return StageReport(output_uri, "completed", {})

    newer(older.uri)
    assert read_failure(older.uri) is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_stopped_attempt_is_no_failure_and_leaves_no_old_reason(stage, stop):
    with pytest.raises(StorageError):
        stage.attempt(StorageError("cannot reach"))
    with pytest.raises(type(stop)):
        stage.attempt(stop)
    assert read_failure(stage.uri) is None


def test_a_final_error_ends_the_later_attempts_of_its_task_at_once(stage, in_pod, capsys):
    in_pod(f"{NODE}(0)", "pod-0")
    with pytest.raises(ConfigError):
        stage.attempt(ConfigError("training.beta: too high"))
    for attempt in (1, 2):
        in_pod(f"{NODE}({attempt})", f"pod-{attempt}")
        with pytest.raises(
            RepeatError, match=r"training.beta: too high \(said by attempt 1, pod pod-0; not tried again"
        ):
            stage.attempt()
    assert stage.num_made == 1
    assert read_failure(stage.uri).pod == "pod-0"
    assert "train: not tried again: attempt 1 met what every other one would meet" in capsys.readouterr().err


def test_a_person_who_retries_the_run_begins_at_the_first_attempt_and_is_not_held_up(stage, in_pod):
    in_pod(f"{NODE}(1)")
    with pytest.raises(ConfigError):
        stage.attempt(ConfigError("training.beta: too high"))
    in_pod(f"{NODE}(0)")
    with pytest.raises(KeyboardInterrupt):
        stage.attempt(KeyboardInterrupt())
    # The second attempt of the retry knows nothing of what was said before it.
    in_pod(f"{NODE}(1)")
    assert stage.attempt().status == "completed"


@pytest.mark.parametrize("node", [f"{NODE}(1)".replace("4r7mm", "c2j2z"), "", f"{NODE}(0)"])
def test_another_run_and_a_person_at_a_terminal_try_again(stage, in_pod, node):
    in_pod(f"{NODE}(0)")
    with pytest.raises(ConfigError):
        stage.attempt(ConfigError("training.beta: too high"))
    in_pod(node)
    assert stage.attempt().status == "completed"


def test_an_error_that_may_pass_is_tried_again(stage, in_pod):
    in_pod(f"{NODE}(0)")
    with pytest.raises(StorageError):
        stage.attempt(StorageError("cannot reach"))
    in_pod(f"{NODE}(1)")
    assert stage.attempt().status == "completed"


def test_a_stage_outside_of_a_run_leaves_nothing(tmp_path):
    stage = Stage(tmp_path)
    stage.uri = str(tmp_path / "out")
    with pytest.raises(ConfigError):
        stage.attempt(ConfigError("training.beta: too high"))
    assert list(tmp_path.iterdir()) == []


def page(root: Path) -> str:
    return (root / "runs" / "second" / "report" / "report.html").read_text()


def test_a_failure_is_on_the_page_at_once_and_gone_from_it_with_the_next_evaluation(tmp_path, in_pod):
    in_pod(f"{NODE}(1)", "dice-demo-4r7mm-318")
    train, evaluate = Stage(tmp_path), Stage(tmp_path, EVALUATE)
    with pytest.raises(LaunchError):
        train.attempt(LaunchError("training failed: <the disk> is full"))
    said = page(tmp_path)
    assert (
        'Iteration 1: train</strong> <span class="state failed">failed</span>: training failed: &lt;the disk&gt;'
        in said
    )
    assert "attempt 2, pod dice-demo-4r7mm-318" in said and "not started" not in said
    train.attempt()
    assert "the disk" in page(tmp_path)
    evaluate.attempt()
    assert "the disk" not in page(tmp_path)


def test_a_page_that_cannot_be_written_neither_hides_nor_replaces_the_error(tmp_path, stage, capsys):
    other = Manifest(stage="import-model", fingerprint="f", files={})
    publish_files(layout.report(layout.run(str(tmp_path), "second")), {}, other)
    with pytest.raises(LaunchError, match="the disk is full"):
        stage.attempt(LaunchError("the disk is full"))
    assert read_failure(stage.uri).reason == "the disk is full"
    assert "report: the page of the run was not brought up to date: " in capsys.readouterr().err


def test_a_reason_that_cannot_be_stored_neither_hides_nor_replaces_the_error(tmp_path, capsys):
    place = tmp_path / "runs" / "second" / "iteration-1" / "train"

    @leaves_reason(TRAIN)
    def work(output_uri: str) -> StageReport:
        place.parent.mkdir(parents=True)
        place.touch()
        raise LaunchError("the disk is full")

    with pytest.raises(LaunchError, match="the disk is full"):
        work(str(place))
    assert "train: why it failed could not be stored: " in capsys.readouterr().err


@pytest.mark.parametrize("planned", [None, 3])
def test_the_page_knows_the_planned_iterations_where_they_were_written_down(tmp_path, stage, planned):
    if planned:
        record = Manifest(stage="check-settings", fingerprint="", files={}, settings={"num_iterations": planned})
        publish_files(layout.check_settings(layout.run(str(tmp_path), "second")), {}, record)
    with pytest.raises(LaunchError):
        stage.attempt(LaunchError("the disk is full"))
    numbers = json.loads((tmp_path / "runs" / "second" / "report" / "summary.json").read_text())
    assert [(one["iteration"], one["status"]) for one in numbers["iterations"]] == [
        (1, "train failed"),
        *((number, "not started") for number in range(2, (planned or 1) + 1)),
    ]


def test_real_stages_leave_their_reason_wherever_they_find_the_fault(tmp_path):
    """Settings, sources and models are looked at before the runner is asked."""
    root = str(tmp_path)
    run = layout.run(root, "second")
    with pytest.raises(ConfigError):
        generate("p", "d", layout.shard(run, 1, "generate", 0, 1), generation={"num_responses": 1})
    with pytest.raises(StorageError):
        prepare_data("/no/such/file.jsonl", layout.data(run), policy_uri=layout.model(root, "m"))
    with pytest.raises(ModelError):
        import_model("/no/such/model", layout.model(root, "Such/Model"), run_uri=run)
    with pytest.raises(StorageError):
        choose_inputs(
            root, "july", "0123456789", promote_as="p", policy_source="a", reference_source="", prompts_source=""
        )
    found = {failure.title: failure.is_final for failure in failures_of_run(run)}
    assert found == {"import-model such--model": True, "iteration 1: generate 1 of 1": True, "prepare-data": True}
    [chosen] = failures_of_run(layout.run(root, "july-01234567"))
    assert (chosen.title, chosen.is_final) == ("choose-inputs", True)
    assert "Import-model such--model" in page(tmp_path)


def test_every_stage_that_works_for_a_run_leaves_its_reason():
    # The others surround a part of what they do.
    others = (IMPORT_MODEL, REPORT, ALPACA_EVAL)
    working = [stage for stage in STAGES.values() if stage.is_command and stage not in others]
    assert {"prepare-data", "generate", "score", "pair", "train", "evaluate"} <= {stage.name for stage in working}
    for stage in working:
        assert inspect.unwrap(stage.function) is not stage.function
