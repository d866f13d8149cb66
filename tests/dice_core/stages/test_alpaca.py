"""`dice alpaca-eval`: real answers of vLLM, resumed; the real alpaca_eval, in its own environment, on a judge here."""

import csv
import json
import math
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dice_core import cli
from dice_core.generation import responses
from dice_core.models.importing import import_model
from dice_core.stages.alpaca_eval import alpaca_eval
from dice_core.stages.alpaca_scores import alpaca_scores
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, publish_files, require_manifest
from tests.finished_run import publish
from tests.mlflow_server import ROOT, python_of

NUM_PROMPTS = 10
CHAT = {"prompt_format": "model", "max_prompt_tokens": 64}
GENERATION = {"dtype": "float32", "max_new_tokens": 8, "prompts_per_part": 4, "max_concurrent_sequences": 8}


@pytest.fixture
def prompts(tmp_path):
    """The file of a baseline's outputs, in AlpacaEval's form, of our own making."""
    rows = [
        {"instruction": f"Name {i} fruits.", "output": "pear " * (i + 1), "generator": "base", "dataset": "d"}
        for i in range(NUM_PROMPTS)
    ]
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(rows))
    return str(path)


def answered(root: Path, prompts: str, name: str = "mine") -> str:
    """Store answers as the stage does, without a model; their lengths differ."""
    path = root / "model_outputs.json"
    rows = [
        {"instruction": row["instruction"], "output": "apple " * (2 * i % 7 + 1), "generator": name}
        for i, row in enumerate(json.loads(Path(prompts).read_text()))
    ]
    path.write_text(json.dumps(rows))
    uri = str(root / "alpaca-eval")
    from dice_core.stages.prepare_data import local_sources

    with local_sources({"prompts": prompts}) as sources:
        digest = sources["prompts"].digest
    settings = {"prompts": digest}
    publish_files(uri, {path.name: path}, Manifest(stage="alpaca-eval", fingerprint="", files={}, settings=settings))
    return uri


def wider(tiny_model: Path, folder: Path) -> Path:
    """Write a model with heads of 64, as vLLM needs them on a CPU."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_model)
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), **shape})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_policy_answers_as_its_run_samples_and_goes_on_where_it_was_killed(
    tiny_model, tmp_path, prompts, monkeypatch
):
    root = str(tmp_path / "root")
    run = layout.run(root, "march")
    policy = layout.stage(run, 2, "train")
    publish(layout.check_settings(run), "check-settings", settings={"generation": GENERATION, "chat": CHAT})
    import_model(str(wider(tiny_model, tmp_path / "wider")), layout.model(root, "tiny"))
    manifest = require_manifest(layout.model(root, "tiny"))
    files = {name: Path(layout.model(root, "tiny"), name) for name in manifest.files}
    publish_files(policy, files, Manifest(stage="train", fingerprint="", files={}))
    output = layout.stage(run, 2, "alpaca-eval")
    generate_parts = responses.generate_parts
    asked: list[list[int]] = []

    def killed(*arguments: Any, **options: Any) -> Iterator[Any]:
        asked.append(list(options["parts"]))
        for number, part in enumerate(generate_parts(*arguments, **options)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(responses, "generate_parts", killed)
    with pytest.raises(KeyboardInterrupt):
        alpaca_eval(policy, prompts, output)
    report = alpaca_eval(policy, prompts, output)
    assert asked[0] == [0, 1, 2] and len(asked[1]) < 3
    rows = json.loads(open_storage(output).read_bytes("model_outputs.json"))
    assert [row["instruction"] for row in rows] == [f"Name {i} fruits." for i in range(NUM_PROMPTS)]
    assert {row["generator"] for row in rows} == {"march-iteration-2"} and {row["dataset"] for row in rows} == {"d"}
    assert report.metrics["num_prompts"] == NUM_PROMPTS and 0 < report.metrics["num_cut_answers"] <= NUM_PROMPTS
    settings = require_manifest(output).settings
    assert settings["generation"]["max_new_tokens"] == 8 and settings["chat"]["max_prompt_tokens"] == 64
    assert alpaca_eval(policy, prompts, output).status == "already complete"


class Judge(ThreadingHTTPServer):
    """An OpenAI-compatible server that prefers the first answer it is shown by 0.7 to 0.3, and counts its calls."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.num_calls = 0


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.num_calls += 1
        tops = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in (("m", 0.7), ("M", 0.3))]
        said = {"content": [{**tops[0], "top_logprobs": tops}]}
        message = {"role": "assistant", "content": "m"}
        choice = {"index": 0, "finish_reason": "length", "message": message, "logprobs": said}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
        data = json.dumps({**answer, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def judge(tmp_path, monkeypatch) -> Iterator[Judge]:
    """A judge, and what alpaca_eval reads from the Hub for its regression: of our own making, in the Hub's cache."""
    snapshot = tmp_path / "hf" / "hub" / "datasets--tatsu-lab--alpaca_eval" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0a1b")
    with (snapshot / "df_gamed.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        columns = ["model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
        table.writerow(columns)
        for sign, model in ((1, "concise"), (-1, "verbose")):
            table.writerows([model, i, 0.5, sign * (-1) ** i, 0.1 * i - 0.5, False] for i in range(NUM_PROMPTS))
    with Judge() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        values = {
            "OPENAI_API_KEY": "key",
            "OPENAI_BASE_URL": url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()


@pytest.mark.slow
def test_the_real_alpaca_eval_judges_and_its_rates_are_stored(judge, tmp_path, prompts, monkeypatch, capsys):
    program = python_of(ROOT / "requirements" / "alpaca.lock").with_name("alpaca_eval")
    monkeypatch.setenv("DICE_ALPACA_EVAL", str(program))
    answers, output = answered(tmp_path, prompts), str(tmp_path / "alpaca-scores")
    annotator = "weighted_alpaca_eval_gpt4_turbo"
    words = ["alpaca-scores", "--answers", answers, "--prompts", prompts, "--output", output, "--annotator", annotator]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert judge.num_calls == NUM_PROMPTS
    metrics = require_manifest(output).metrics
    stored = json.loads(open_storage(output).read_bytes("scores.json"))
    # alpaca_eval draws who is shown first: each preference is 0.7 or 0.3, and the rate their mean.
    assert len(stored["preferences"]) == NUM_PROMPTS
    assert all(min(abs(p - 0.7), abs(p - 0.3)) < 1e-6 for p in stored["preferences"])
    assert math.isclose(metrics["win_rate_percent"], 100 * sum(stored["preferences"]) / NUM_PROMPTS, abs_tol=1e-6)
    assert 0 <= metrics["length_controlled_win_rate_percent"] <= 100
    assert 0 < metrics["length_controlled_win_rate_percent_by_length"] < 100
    assert (metrics["annotator"], metrics["baseline"]) == (annotator, "base")
    assert "Name 1 fruits." not in open_storage(output).read_bytes("scores.json").decode()
    capsys.readouterr()
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "already complete" and judge.num_calls == NUM_PROMPTS


def results(folder: Path, answers: str, rate: float = 0.25) -> str:
    """Write what alpaca_eval writes, with one preference for all."""
    rows = json.loads(open_storage(answers).read_bytes("model_outputs.json"))
    verdict = {"generator_1": "base", "annotator": "weighted", "preference": 1 + rate}
    annotations = [
        {"instruction": row["instruction"], "output_1": "b" * i, "output_2": row["output"], **verdict}
        for i, row in enumerate(rows)
    ]
    (folder / "weighted").mkdir(parents=True)
    (folder / "weighted" / "annotations.json").write_text(json.dumps(annotations))
    board = f",win_rate,length_controlled_winrate\n{rows[0]['generator']},{100 * rate},27.5\n"
    (folder / "weighted" / "leaderboard.csv").write_text(board)
    return str(folder)


def test_what_alpaca_eval_has_written_elsewhere_is_read(tmp_path, prompts):
    answers = answered(tmp_path, prompts)
    report = alpaca_scores(answers, str(tmp_path / "s"), results_source=results(tmp_path / "r", answers))
    assert report.metrics["length_controlled_win_rate_percent"] == 27.5
    assert math.isclose(report.metrics["length_controlled_win_rate_percent_by_length"], 25, abs_tol=0.01)


def test_results_of_other_answers_or_none_are_refused(tmp_path, prompts):
    answers = answered(tmp_path, prompts)
    (tmp_path / "others").mkdir()
    others = results(tmp_path / "r", answered(tmp_path / "others", prompts, "yours"))
    with pytest.raises(ValueError, match="has no row of 'mine', but of 'yours'"):
        alpaca_scores(answers, str(tmp_path / "s"), results_source=others)
    with pytest.raises(UnfitError, match=r"has no leaderboard\.csv of AlpacaEval"):
        alpaca_scores(answers, str(tmp_path / "s"), results_source=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("--annotator a --results r", "give one of the two"),
        ("--annotator a", "no program alpaca_eval here: install requirements/alpaca.lock"),
    ],
)
def test_who_judges_is_known_before_anything_is_sampled(options, fault, tmp_path, prompts, monkeypatch, capsys):
    monkeypatch.setenv("DICE_ALPACA_EVAL", str(tmp_path / "none"))
    words = ["alpaca-eval", "--policy", str(tmp_path / "none"), "--prompts", prompts, "--output", str(tmp_path / "o")]
    assert cli.main([*words, *options.split()]) == 1
    err = capsys.readouterr().err
    assert fault in err and err.count("\n") == 1


def test_a_baseline_without_outputs_or_of_other_prompts_is_refused(tmp_path, prompts, monkeypatch):
    program = tmp_path / "alpaca_eval"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("DICE_ALPACA_EVAL", str(program))
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps([{"instruction": "Why?"}]))
    answers = answered(tmp_path, str(bare))
    with pytest.raises(UnfitError, match="has no outputs of a baseline"):
        alpaca_scores(answers, str(tmp_path / "s"), annotator="a", prompts_source=str(bare))
    with pytest.raises(UnfitError, match="not the file whose prompts were answered"):
        alpaca_scores(answers, str(tmp_path / "s"), annotator="a", prompts_source=prompts)
    (tmp_path / "full").mkdir()
    with pytest.raises(RuntimeError, match="alpaca_eval ended with 3: it said nothing"):
        alpaca_scores(answered(tmp_path / "full", prompts), str(tmp_path / "s"), annotator="a", prompts_source=prompts)
    assert not os.path.exists(tmp_path / "s" / "manifest.json")
