"""`make test-gpu`: sections end in time and without a trace, and their very code runs here on tiny models."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.gpu import __main__ as command
from tests.gpu.runner import Outcome, Section, exit_code, line, run, table
from tests.gpu.section import main as run_section

ROOT = Path(__file__).parents[1]
_WRITES_A_NUMBER = "import json, sys; json.dump({'tokens/s': 1234.5}, open(sys.argv[1], 'w')); print('done')"


def section(name: str, code: str, seconds: float = 60, packages: Sequence[str] = ()) -> Section:
    return Section(name, seconds, packages, lambda file: [sys.executable, "-c", code, str(file)])


@pytest.mark.slow
def test_a_section_that_fails_or_is_late_or_lacks_a_package_does_not_keep_the_others_from_running() -> None:
    sections = [
        section("broken", "print('starts'); raise SystemExit('no kernel image')"),
        section("late", "import time; print('compiles', flush=True); time.sleep(60)", seconds=1),
        section("lacking", "raise SystemExit('unreachable')", packages=["torch", "no-such-package"]),
        section("good", _WRITES_A_NUMBER),
    ]
    told: list[Outcome] = []
    outcomes = run(sections, 60, told.append)
    assert told == outcomes
    assert [(o.section, o.result, o.showed) for o in outcomes] == [
        ("broken", "failed", "no kernel image"),
        ("late", "out of time", "1 s are over, at: compiles"),
        ("lacking", "left out", "not installed here: no-such-package"),
        ("good", "passed", "done"),
    ]
    assert outcomes[3].numbers == {"tokens/s": 1234.5}
    assert 1 <= outcomes[1].seconds < 10
    assert exit_code(outcomes) == 1


def test_a_section_has_shown_what_it_measured_before_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_: object) -> Iterator[dict[str, float]]:
        yield {"first": 1.5}
        raise AssertionError("the second is wrong")

    monkeypatch.setattr("tests.gpu.speed.measure", measure)
    with pytest.raises(AssertionError, match="the second is wrong"):
        run_section("speed", "full", str(tmp_path / "numbers.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    assert json.loads((tmp_path / "numbers.json").read_text()) == {"first": 1.5}


@pytest.mark.slow
def test_a_section_that_is_ended_takes_what_it_started_with_it(tmp_path: Path) -> None:
    starts = f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w')"
    starts += ".write(str(p.pid)); time.sleep(60)"
    [outcome] = run([section("late", starts, seconds=2)], 60, lambda _: None)
    assert outcome.result == "out of time"
    process = Path(f"/proc/{(tmp_path / 'pid').read_text()}")
    end = time.monotonic() + 10
    while process.exists() and "Z" not in process.joinpath("stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_no_section_begins_that_the_whole_time_leaves_too_little_for() -> None:
    outcomes = run([section("first", "import time; time.sleep(1)"), section("second", "")], 30.5, lambda _: None)
    assert [o.result for o in outcomes] == ["passed", "left out"]
    assert outcomes[1].showed in ("29 s are left of the whole time", "30 s are left of the whole time")


def test_the_table_has_a_line_for_each_number() -> None:
    outcomes = [
        Outcome("speed", "passed", 61.4, "the last line", {"tokens/s": 12345.6, "mfu": 0.4321, "model": "8B"}),
        Outcome("tests", "passed", 30.0, "17 passed in 30 s"),
        Outcome("zero3", "failed", 5.0, "it differs", {"loss": 0.5}),
    ]
    assert table(outcomes).splitlines()[2:] == [
        "| speed | passed | 61 | tokens/s: 12,346 |",
        "| | | | mfu: 0.432 |",
        "| | | | model: 8B |",
        "| tests | passed | 30 | 17 passed in 30 s |",
        "| zero3 | failed | 5 | it differs |",
        "| | | | loss: 0.5 |",
    ]
    assert line(outcomes[1]) == (
        '{"section": "tests", "result": "passed", "seconds": 30.0, "showed": "17 passed in 30 s", "numbers": {}}'
    )


@pytest.mark.parametrize(
    ("results", "code"), [(["passed", "left out"], 0), (["left out"], 1), (["passed", "out of time"], 1), ([], 1)]
)
def test_success_is_that_something_ran_and_all_of_it_passed(results: list[str], code: int) -> None:
    assert exit_code([Outcome("x", result) for result in results]) == code  # type: ignore[arg-type]


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="a GPU is here")
def test_without_a_gpu_make_says_so_in_a_line_and_installs_nothing(tmp_path: Path) -> None:
    arguments = ["make", "--silent", "test-gpu", f"GPU_VENV={tmp_path / 'venv'}"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert result.stderr.splitlines()[0] == "make: left out: all, no CUDA device here (no /dev/nvidia0)"
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_a_torch_that_sees_no_gpu_leaves_everything_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 1
    assert capsys.readouterr().err.startswith("test-gpu: left out: all, torch 2")


def test_the_sections_are_done_within_ten_minutes() -> None:
    limits = {section.name: section.seconds for section in command.sections("full")}
    assert list(limits) == ["attention", "zero3", "speed", "generation", "training", "tests"]
    # What shows most comes first; the time of the whole is what ends the last ones.
    assert command._parser().parse_args([]).minutes * 60 + 20 < 600
    assert sum(list(limits.values())[:4]) <= 9.5 * 60


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, object]]]:
    """Run a section in this process, with tiny models on the CPU, and give its numbers."""
    import torch

    from tests.gpu.scale import SCALES

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A section sets them.
    for name in ("DICE_CACHE", "DICE_SCRATCH"):
        monkeypatch.setenv(name, os.environ[name])
    num_threads = torch.get_num_threads()
    # With more, threads of tiny matrices mostly wait for each other.
    torch.set_num_threads(1)
    yield lambda name: list(importlib.import_module(f"tests.gpu.{name}").measure(SCALES["small"]))[-1]
    torch.set_num_threads(num_threads)


@pytest.mark.slow
def test_packed_attention_is_that_of_single_rows_and_a_window_that_is_forgotten_is_found(
    small: Callable[[str], dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = small("attention")
    assert numbers["gemma2, soft cap: attention"] == "dice_segments"
    assert len([name for name in numbers if name.endswith("float32, nats")]) == 4
    monkeypatch.setattr("dice_core.logprobs.attention.MAKES_WINDOWS", "no such function")
    with pytest.raises(AssertionError, match="mistral, window: float32, nats"):
        small("attention")


@pytest.mark.slow
def test_scoring_and_training_of_a_whole_model_are_measured(small: Callable[[str], dict[str, object]]) -> None:
    numbers = small("speed")
    for what in ("score, ours", "train, ours"):
        assert float(str(numbers[f"a tiny Llama, {what}, tokens/s"])) > 0
    assert not [name for name in numbers if "peak, TFLOP" in name or "share of" in name]


@pytest.mark.slow
def test_vllm_answers_with_weights_that_it_makes_up(small: Callable[[str], dict[str, object]]) -> None:
    assert float(str(small("generation")["response tokens per second"])) > 0


@pytest.mark.slow
def test_zero3_and_a_process_without_agree(small: Callable[[str], dict[str, object]]) -> None:
    numbers = small("zero3")
    # Embedding, head, and seven in each of two layers.
    assert numbers["1 process: matrices cut up"] == 2 + 2 * 7
    assert numbers["2 processes"] == "left out: they need 2 GPUs, and 0 are seen here"


@pytest.mark.slow
def test_training_says_how_long_it_stood_still_for_checkpoints(small: Callable[[str], dict[str, object]]) -> None:
    numbers = small("training")
    assert 0 < float(str(numbers["seconds that training stands still for it"])) < 10
    assert float(str(numbers["tokens_per_second"])) > 0
    assert "mfu" not in numbers
