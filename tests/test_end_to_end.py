"""`make demo` on a tiny model: stopped by Ctrl-C in the middle, run again, two iterations later a report.

Everything is real: kfp.local, its subprocesses, S3, vLLM, training. Only the weights are random and the numbers small.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dice_core.storage import layout
from dice_core.storage.manifest import Manifest, read_manifest
from pipelines.demo import demo

pytestmark = pytest.mark.slow

ROOT_URI = "s3://dice/demo"
STAGES = ("pair", "train", "evaluate")
SETTINGS = [
    "data.max_prompts=6",
    "data.num_held_out=4",
    "generation.num_responses=3",
    "generation.max_new_tokens=48",
    "generation.prompts_per_part=4",
    "pairing.num_eval_pairs=2",
    "training.max_steps=2",
    "training.global_batch_size=2",
    "training.per_device_batch_size=2",
    "warm_start_training.max_steps=2",
    "warm_start_training.global_batch_size=2",
    "warm_start_training.per_device_batch_size=2",
    "evaluation.num_sample_prompts=2",
    "evaluation.num_shown_samples=2",
    "evaluation.max_new_tokens=16",
    # Whatever random weights come to, the second iteration must run.
    "evaluation.max_length_growth=1000",
    "evaluation.max_accuracy_drop=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end-to-end") / "demo"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model that ends its turn after some 12 tokens; one that hardly ever does has no valid answer."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny_model)
    # vLLM's attention on CPU takes heads of 32 and more.
    config.head_dim, config.tie_word_embeddings = 32, False
    torch.manual_seed(0)
    random = LlamaForCausalLM(config)
    # All embeddings lean to one side, and so does what comes out; the end-of-turn row looks that way.
    side = torch.ones(config.hidden_size) / config.hidden_size**0.5
    with torch.no_grad():
        random.model.embed_tokens.weight += side
        random.lm_head.weight[config.eos_token_id] += 1.15 * side
    folder = tmp_path_factory.mktemp("model")
    random.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def start_demo(folder: Path, model: Path) -> subprocess.Popen[str]:
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pipelines.demo", "--folder", str(folder)]
    return subprocess.Popen(
        [*command, "--set", f"policy_source={model}", *SETTINGS],
        cwd=Path(demo.__file__).parents[2],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """Serve what a demo left in its folder."""
    with demo.folder_server(folder, None, keep=False) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        yield


def manifests() -> dict[str, Manifest]:
    """Return the manifests of the run by stage; of those that have one."""
    run = layout.run(ROOT_URI, demo.RUN)
    uris = {
        "data": layout.data(run),
        **{f"warm start {name}": layout.warm_start(run, name) for name in ("pair", "train")},
    }
    for t in (1, 2):
        uris |= {f"{name} {t}": layout.shard(run, t, name, 0, 1) for name in ("generate", "score")}
        uris |= {f"{name} {t}": layout.stage(run, t, name) for name in STAGES}
    found = {name: read_manifest(uri) for name, uri in uris.items()}
    return {name: manifest for name, manifest in found.items() if manifest}


def log_of(folder: Path) -> str:
    file = folder / "log"
    return file.read_text() if file.exists() else ""


@pytest.fixture(scope="module")
def interrupted(folder: Path, model: Path) -> tuple[int, list[psutil.Process], set[str]]:
    """Press Ctrl-C when the responses of iteration 1 are there.

    Returns:
        The exit code, the processes that were running and still are, the stages that had finished.
    """
    process = start_demo(folder, model)
    while "generate: completed in" not in log_of(folder):
        assert process.poll() is None
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the S3 server, the run, its task
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=60)
    with served(folder):
        return process.returncode, alive, set(manifests())


@pytest.fixture(scope="module")
def output(folder: Path, model: Path, interrupted: object) -> str:
    """Run the demo again, to its end."""
    process = start_demo(folder, model)
    text, _ = process.communicate()
    assert process.returncode == 0, text + (folder / "log").read_text()[-5000:]
    return text


@pytest.fixture(scope="module")
def stages(folder: Path, output: str) -> dict[str, Manifest]:
    with served(folder):
        return manifests()


def test_ctrl_c_stops_everything(interrupted: tuple[int, list[psutil.Process], set[str]]) -> None:
    exit_code, alive, finished = interrupted
    assert exit_code == 130
    assert alive == []
    # The stop may come after scoring, which takes a second here.
    assert finished - {"score 1"} == {"data", "warm start pair", "warm start train", "generate 1"}


def test_the_second_time_it_goes_on(output: str, folder: Path) -> None:
    lines = [line.partition("] ")[2] for line in output.splitlines() if "/14]" in line]
    assert len(lines) == 14
    kept = [line.partition(":   ")[0] for line in lines if "already complete" in line]
    assert kept[:4] == ["import policy", "prepare data", "warm start: pair", "warm start: train"]
    # Of a task that both generates and scores, one may be done.
    assert log_of(folder).count("generate: already complete") == 1
    assert log_of(folder).count("generate: completed in") == 1


def test_two_iterations_came_to_their_end(stages: dict[str, Manifest]) -> None:
    expected = [f"{name} {t}" for t in (1, 2) for name in ("generate", "score", *STAGES)]
    assert set(stages) == {"data", "warm start pair", "warm start train", *expected}
    assert all(not manifest.skipped for manifest in stages.values())


def test_prompts_times_k_were_generated_and_every_response_is_accounted_for(stages: dict[str, Manifest]) -> None:
    for t in (1, 2):
        generated, scored = stages[f"generate {t}"].metrics, stages[f"score {t}"].metrics
        assert generated["num_responses"] == 6 * 3
        dropped = sum(int(value) for name, value in scored.items() if name.startswith("num_dropped"))
        assert int(scored["num_scored"]) + dropped == 18
        assert int(scored["num_scored"]) >= 8


def test_each_iteration_reads_the_models_of_the_ones_before(stages: dict[str, Manifest]) -> None:
    def model(name: str) -> str:
        return stages[name].content_digest

    def read(stage: str, name: str) -> str:
        return str(stages[stage].inputs[name]).rpartition("@")[2]

    assert (read("generate 1", "policy"), read("score 1", "policy")) == (model("warm start train"),) * 2
    assert read("score 2", "reference") == read("train 1", "policy") == model("warm start train")
    assert read("score 2", "policy") == read("train 2", "policy") == model("train 1")


def test_each_stage_that_computes_says_what_ran_it(stages: dict[str, Manifest]) -> None:
    assert stages["generate 2"].ran_by == {"runner": "vllm", "tensor_parallel_size": 1}
    assert stages["score 2"].ran_by == {"runner": "in-process", "devices_per_model": 1}
    trained = stages["train 2"].ran_by
    assert (trained["runner"], trained["data_parallel_size"], trained["zero_stage"]) == ("torchrun", 1, 0)
    assert stages["evaluate 2"].ran_by == {
        "runner": "in-process",
        "tensor_parallel_size": 1,
        "devices_per_model": 1,
    }
    assert not stages["pair 2"].ran_by


def test_training_changed_the_model_each_time(stages: dict[str, Manifest]) -> None:
    weights = {stages[name].content_digest for name in ("warm start train", "train 1", "train 2")}
    assert len(weights) == 3


def test_the_result_is_shown_and_kept(output: str, folder: Path) -> None:
    page = folder / "report.html"
    assert "iteration 2" in output.splitlines()[-12] or "iteration 2" in output
    assert str(page) in output
    (line,) = [line for line in output.splitlines() if "] iteration 2: generate and score 1 of 1: " in line]
    assert "6 prompts, 18 responses" in line and " scored, reward mean " in line
    assert 5_000 < page.stat().st_size < 1_000_000
    assert "<script src" not in page.read_text() and "http://" not in page.read_text().replace("http://www.w3.org", "")


def test_no_temporary_file_is_left(output: str, folder: Path) -> None:
    assert list((folder.parent / "scratch").glob("dice-demo-*")) == []
