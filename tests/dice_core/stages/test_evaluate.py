"""Stage evaluate with real engines on random weights: what is sampled, taken, judged, refused and promoted."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from dice_core.data import records
from dice_core.data.records import PREFERENCES, RESPONSES
from dice_core.evaluation.result import SHOWN
from dice_core.models.files import ModelError
from dice_core.settings.base import ConfigError
from dice_core.stages import evaluation_steps
from dice_core.stages.evaluate import evaluate
from dice_core.stages.import_model import import_model
from dice_core.stages.runner import StageReport
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files, require_manifest
from dice_core.storage.promotion import promote, read_promotion

pytestmark = pytest.mark.slow

EVALUATION = {
    "dtype": "float32",
    "num_sample_prompts": 3,
    "max_new_tokens": 8,
    "tokens_per_batch": 256,
    # Random weights answer anything.
    "max_length_growth": 100.0,
    "max_accuracy_drop": 1.0,
    "max_cut_growth": 1.0,
}
GENERATION = {"dtype": "float32", "temperature": 0.9}
SETTINGS: dict[str, Any] = {"evaluation": EVALUATION, "generation": GENERATION, "chat": {"max_prompt_tokens": 64}}
ROWS = [
    ("Name a fruit.", "An apple is a fruit.", "No."),
    ("What is 2 + 2?", "It is 4.", "It is 5, or perhaps 6."),
    ("Say hello.", "Hello there!", "Bye."),
    ("Why is the sky blue?", "Air scatters blue light most.", "It is not."),
]
ENGINE_STARTS = "vLLM is ready"


class Run:
    """Models, data and evaluations in a folder: the policy of each iteration is the one before it, moved a little."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder, self.log = folder, ""
        self.policies = [import_model(str(model), str(folder / "policy-0")).uri]
        for number in (1, 2):
            moved = self.moved(model, folder / f"moved-{number}", number)
            self.policies.append(import_model(str(moved), str(folder / f"policy-{number}")).uri)
        rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS]
        rows = [{"prompt_id": records.prompt_id(row["prompt"]), **row} for row in rows]
        import pyarrow as pa

        records.write_table(pa.Table.from_pylist(rows, schema=PREFERENCES), PREFERENCES, folder / "held_out.parquet")
        self.data = str(folder / "data")
        files = {"held_out.parquet": folder / "held_out.parquet"}
        publish_files(self.data, files, Manifest(stage="prepare-data", fingerprint="", files={}))

    @staticmethod
    def moved(model: Path, folder: Path, seed: int) -> Path:
        import torch

        from dice_core.models.loading import load_model, load_tokenizer
        from dice_core.models.saving import save_model

        torch.manual_seed(seed)
        loaded = load_model(model, "float32")
        for parameter in loaded.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        save_model(loaded, load_tokenizer(model), folder, "float32")
        return folder

    def evaluate(self, iteration: int, output: str = "", **given: Any) -> StageReport:
        policies = self.policies
        options = {"first_uri": policies[0], "iteration": iteration, **SETTINGS, **given}
        place = output or self.place(iteration)
        return evaluate(policies[iteration], policies[iteration - 1], policies[0], self.data, place, **options)

    def place(self, iteration: int) -> str:
        return str(self.folder / f"iteration-{iteration}" / "evaluate")


def result_of(uri: str) -> dict[str, Any]:
    [name] = [name for name in require_manifest(uri).files if name.startswith("evaluation-")]
    found: dict[str, Any] = json.loads((Path(uri) / name).read_text())
    return found


def answers(uri: str, role: str) -> list[str]:
    return [sample[role]["text"] for sample in result_of(uri)["samples"]]


@pytest.fixture(scope="module")
def run(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose first evaluation was killed before its first log-probs and again before its decision."""
    run, killed = Run(served_model, tmp_path_factory.mktemp("run")), []
    for step in ("score_under", "summarise"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluation_steps, step, interrupt)
            run.evaluate(1)
        killed.append(sorted(path.name.split("-")[0] for path in Path(run.place(1)).glob("*.parquet")))
    assert killed[0] == ["answers"] * 2 and killed[1] == ["answer"] * 2 + ["answers"] * 2 + ["logps"] * 2
    run.evaluate(1)
    yield run


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_evaluation_goes_on_with_what_is_kept_and_starts_no_engine_twice(
    run: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In one go, with the answers that were sampled in pieces: the same, without an engine."""
    whole = run.evaluate(1, str(tmp_path / "whole"), earlier_uri=run.place(1))
    assert ENGINE_STARTS not in capfd.readouterr().err
    kept = require_manifest(run.place(1)).metrics
    assert {**whole.metrics, "seconds": 0} == {**kept, "seconds": 0}
    assert run.evaluate(1).status == "already complete"


def test_an_evaluation_says_what_it_has_measured_against_whom(run: Run) -> None:
    found = result_of(run.place(1))
    assert found["compared_with"]["uri"] == run.policies[0]
    assert found["compared_with"]["what"] == "first policy"
    assert found["gate"]["outcome"] == "not shown" and found["gate"]["accepted"]
    metrics = found["metrics"]
    assert (metrics["num_sample_prompts"], metrics["num_held_out_pairs"]) == (3, 4)
    assert metrics["heldout_reward_margin_incumbent"] == 0, "it is its own base reference"
    assert metrics["heldout_reward_margin"] == pytest.approx(metrics["heldout_step_margin"])
    rewards = [sample["policy"]["reward"] for sample in found["samples"]]
    tokens = [sample["policy"]["num_tokens"] for sample in found["samples"]]
    assert metrics["drift_per_token"] == pytest.approx(sum(rewards) / sum(tokens)) and metrics["drift_per_token"] > 0
    assert [sample["prompt"] for sample in found["samples"]] == [row[0] for row in ROWS[:3]]


def test_the_next_evaluation_follows_the_prompts_and_samples_from_the_new_policy_alone(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    run.evaluate(2, earlier_uri=run.place(1))
    said = capfd.readouterr().err
    assert said.count(ENGINE_STARTS) == 1
    loaded = re.findall(r"log-probs of .*, (.*)", said)
    assert loaded == ["new policy", "new policy", "incumbent and base reference and first policy"]
    assert answers(run.place(2), "incumbent") == answers(run.place(1), "incumbent")
    one, two = (result_of(run.place(number))["metrics"] for number in (1, 2))
    assert two["heldout_reward_accuracy_previous"] == one["heldout_reward_accuracy"]


def test_the_answers_of_a_policy_are_the_same_in_the_iteration_in_which_it_is_the_incumbent(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is taken from the evaluation before: both models are sampled anew, in another iteration."""
    place = str(tmp_path / "anew")
    run.evaluate(2, place, incumbent_uri=run.policies[1])
    assert capfd.readouterr().err.count(ENGINE_STARTS) == 2
    assert answers(place, "incumbent") == answers(run.place(1), "policy")
    assert result_of(place)["compared_with"]["what"] == "given model"


def better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let four pairs be enough to be better by."""
    original = evaluation_steps.summarise

    def summarise(pairs: Any, *rest: Any, **options: Any) -> Any:
        from dataclasses import replace

        many = {
            name: [[1.0, 0.0] if name == "policy" else [0.0, 1.0]] * 400 for name in ("policy", "incumbent", "previous")
        }
        import numpy as np

        arrays = {name: np.array(values) for name, values in many.items()}
        return original(replace(pairs, **arrays, base=np.zeros((400, 2))), *rest, **options)

    monkeypatch.setattr(evaluation_steps, "summarise", summarise)


def digest(uri: str) -> str:
    return require_manifest(uri).content_digest


def test_a_better_policy_takes_the_place_of_the_promoted_one_it_was_compared_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better(monkeypatch)
    pointer = str(tmp_path / "promoted.json")
    promote(pointer, run.policies[0], digest(run.policies[0]), evaluated="e", iteration=0)
    made = run.evaluate(1, str(tmp_path / "out"), promoted_uri=pointer, earlier_uri=run.place(1))
    assert (made.metrics["promotable"], made.metrics["promotion"]) == (1, "promoted")
    found = read_promotion(pointer)
    assert found is not None and found.policy_uri == run.policies[1] and found.replaces == run.policies[0]
    compared = result_of(str(tmp_path / "out"))["compared_with"]
    assert compared == {
        "uri": run.policies[0],
        "what": "promoted model",
        "promoted_uri": pointer,
        "promoted_digest": digest(run.policies[0]),
    }


def test_a_policy_is_not_promoted_over_a_model_that_it_was_not_compared_with(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed when all was measured; somebody promotes another policy; the retry compares with what it began with."""
    better(monkeypatch)
    pointer, out = str(tmp_path / "promoted.json"), str(tmp_path / "out")
    options = {"promoted_uri": pointer, "earlier_uri": run.place(1)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation_steps, "summarise", interrupt)
        run.evaluate(1, out, **options)
    promote(pointer, run.policies[2], digest(run.policies[2]), evaluated="e", iteration=2)
    made = run.evaluate(1, out, **options)
    assert result_of(out)["compared_with"]["what"] == "first policy"
    assert made.metrics["promotable"] == 1
    assert str(made.metrics["promotion"]).startswith(f"not promoted: {pointer}: names {run.policies[2]} by now")
    assert "was not measured against: it is not promoted" in capfd.readouterr().err
    found = read_promotion(pointer)
    assert found is not None and found.policy_uri == run.policies[2]


def test_a_promoted_policy_that_was_made_anew_is_no_incumbent(run: Run, tmp_path: Path) -> None:
    pointer = str(tmp_path / "promoted.json")
    promote(pointer, run.policies[2], "0" * 64, evaluated="e", iteration=2)
    with pytest.raises(StorageError, match=r"not the policy that was promoted \(content .*: it was made anew since"):
        run.evaluate(1, str(tmp_path / "out"), promoted_uri=pointer, earlier_uri=run.place(1))


@pytest.fixture
def broken_policy(run: Run, tmp_path: Path) -> str:
    """The new policy with a weight that is not a number, as if it had been published so."""
    from safetensors.torch import load_file, save_file

    folder = Path(copytree(run.folder / "moved-1", tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    publish_files(str(tmp_path / "policy"), files, Manifest(stage="train", fingerprint="", files={}))
    return str(tmp_path / "policy")


def test_a_policy_of_no_numbers_is_refused_before_it_is_sampled(
    run: Run, broken_policy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, out = run.policies[0], str(tmp_path / "out")
    made = evaluate(broken_policy, first, first, run.data, out, **SETTINGS)
    reason = "model.safetensors: tensor 'model.norm.weight' has values that are not finite numbers"
    assert made.metrics["accepted"] == 0 and str(made.metrics["reason"]).startswith(reason)
    assert ENGINE_STARTS not in capfd.readouterr().err
    json.dumps(result_of(out), allow_nan=False)
    assert not set(SHOWN) - {"accepted", "promotable"} & set(made.metrics)


def test_an_incumbent_of_no_numbers_ends_the_evaluation(run: Run, broken_policy: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor 'model\.norm\.weight' has values that are not finite numbers"):
        run.evaluate(1, str(tmp_path / "out"), incumbent_uri=broken_policy, earlier_uri=run.place(1))


@pytest.mark.parametrize("judge", ["reward-model", "chat-logprob"])
def test_a_judge_without_its_model_is_one_line_before_anything_is_read(tmp_path: Path, judge: str) -> None:
    with pytest.raises(ConfigError, match=rf"judging.judge: is {judge}, and no model of it was given: name its source"):
        evaluate("p", "p", "p", "d", str(tmp_path), judging={"judge": judge})


def test_a_reward_models_verdicts_decide_and_are_kept(
    run: Run, tmp_path: Path, smollm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.dice_core.judges.conftest import make_reward_model

    source = make_reward_model("llama", smollm, tmp_path / "reward")
    files = {path.name: path for path in source.iterdir() if path.is_file()}
    judge, out = str(tmp_path / "judge"), str(tmp_path / "out")
    kind = {"kind": "reward-model"}
    publish_files(judge, files, Manifest(stage="import-model", fingerprint="", files={}, settings=kind))
    options = {"judge_uri": judge, "judging": {"judge": "reward-model", "dtype": "float32"}}
    options["earlier_uri"] = run.place(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation_steps, "summarise", interrupt)
        run.evaluate(1, out, **options)
    made = run.evaluate(1, out, **options)
    assert capfd.readouterr().err.count(ENGINE_STARTS) == 1, "the judge's"
    found = result_of(out)
    assert found["judging"]["judge"] == "reward-model" and found["judging"]["num_prompts"] == 3
    preferences = [sample["verdict"]["preference"] for sample in found["samples"]]
    assert made.metrics["win_rate"] == pytest.approx(sum(preferences) / 3)
    assert {rule["name"] for rule in found["gate"]["rules"] if rule["kind"] == "gain"} == {
        "win_rate",
        "length_controlled_win_rate",
    }


def test_answers_are_responses_with_one_sample_a_prompt(run: Run) -> None:
    tables = [records.read_table(path, RESPONSES) for path in Path(run.place(1)).glob("answers-*.parquet")]
    assert [table["prompt_id"].to_pylist() for table in tables] == [[records.prompt_id(row[0]) for row in ROWS[:3]]] * 2
    assert all(max(map(len, table["response_token_ids"].to_pylist())) <= 8 for table in tables)
