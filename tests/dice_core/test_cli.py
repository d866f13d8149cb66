"""`dice <stage>` and `dice <command>`: options come from their functions, a mistake is one line and exit code 1."""

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dice_core import cli
from dice_core.settings.base import ConfigError, Values
from dice_core.stages.table import STAGES
from dice_core.storage.manifest import Manifest, publish_files


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def help_of(stage, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([stage, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


STAGES_OF_CLI = {name: stage for name, stage in STAGES.items() if stage.is_command}


@pytest.mark.parametrize("stage", list(cli.COMMANDS))
def test_every_option_of_every_command_has_a_help_text(stage, capsys):
    options = help_of(stage, capsys).partition("options:")[2].partition("\nsettings")[0]
    # argparse puts a help text behind the option, or below it and further to the right.
    entries = re.split(r"^  (?=-)", options, flags=re.MULTILINE)[1:]
    assert len(entries) > (3 if stage in STAGES else 2)
    for entry in entries:
        assert re.search(r" {2,}\S.*$|\n {10,}\S", entry), entry


@pytest.mark.parametrize("stage", [name for name, stage in STAGES_OF_CLI.items() if stage.sections])
def test_help_lists_every_setting_of_the_stage(stage, capsys):
    shown = help_of(stage, capsys).partition("\nsettings")[2]
    for section, kind in STAGES[stage].sections.items():
        for name in kind.model_fields:
            assert f"  {section}.{name}=" in shown


def test_the_parameters_of_every_stage_are_what_its_row_says():
    for stage in STAGES.values():
        parameters = inspect.signature(stage.function).parameters
        settings = {name for name, entry in parameters.items() if entry.annotation == Values}
        assert settings == set(stage.sections), stage.name


def test_help_loads_no_torch_and_no_vllm():
    code = """if True:
        import sys
        from dice_core.cli import build_parser
        build_parser()
        print({"torch", "vllm", "transformers"} & set(sys.modules))
    """
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_misspelt_setting_is_one_line_and_exit_code_1(capsys, tmp_path):
    arguments = ["--policy", "p", "--data", "d", "--output", str(tmp_path / "o"), "--set", "generation.temprature=1"]
    code, out, err = run(capsys, "generate", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("dice: error: generation.temprature: unknown setting, did you mean 'temperature'?")
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_a_model_that_is_not_there_is_one_line_and_leaves_nothing(capsys, tmp_path):
    arguments = ["--policy", str(tmp_path / "m"), "--data", str(tmp_path / "d"), "--output", str(tmp_path / "o")]
    code, _, err = run(capsys, "generate", *arguments)
    assert code == 1
    assert "no manifest.json there" in err
    assert not (tmp_path / "o").exists()


def test_a_misspelt_setting_deletes_nothing_with_overwrite(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    arguments = ["--policy", "p", "--data", "d", "--output", str(tmp_path), "--overwrite"]
    assert run(capsys, "generate", *arguments, "--set", "generation.temprature=1")[0] == 1
    assert (tmp_path / "thesis.txt").exists()


def test_a_config_file_is_read_and_set_wins(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"pairing": {"replay_ratio": 0.2, "num_eval_pairs": 4}, "training": {"beta": 0.1}}))
    chosen = cli.chosen_settings(STAGES["pair"], ["pairing.replay_ratio=0.5"], str(path))
    assert chosen == {"pairing": {"replay_ratio": 0.5, "num_eval_pairs": 4}}


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("import-model", "--source {0}"),
        ("prepare-data", "--preferences p.jsonl --policy {0}"),
        ("generate", "--policy {0} --data {0}"),
        ("score", "--policy {0} --reference {0} --responses {0}"),
        ("pair", "--policy {0} --data {0} --scores {0} --responses {0}"),
        ("train", "--policy {0} --pairs {0}"),
        ("evaluate", "--policy {0} --previous {0} --base-reference {0} --data {0}"),
    ],
)
@pytest.mark.slow
def test_ctrl_c_is_one_line_and_says_that_the_same_command_goes_on(stage, options, tmp_path):
    """While it waits for a manifest, which is a pipe that nobody writes to."""
    manifest = tmp_path / "model" / "manifest.json"
    manifest.parent.mkdir()
    os.mkfifo(manifest)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    words = options.format(manifest.parent).split()
    process = subprocess.Popen(
        [sys.executable, "-m", "dice_core", stage, *words, "--output", str(tmp_path / "out")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while True:
        with contextlib.suppress(OSError):
            # Fails until somebody reads; kept open, so that the reader waits on.
            os.open(manifest, os.O_WRONLY | os.O_NONBLOCK)
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    for _ in range(6):
        # A signal between the opening and the reading of the pipe is heard with the next one.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, err = process.communicate(timeout=10)
            break
    assert (process.returncode, err) == (130, "dice: stopped; the same command goes on\n")


def test_ctrl_c_ends_a_command_with_one_line_while_it_is_still_loading(tmp_path):
    """The last thing that is loaded waits for ever, in code that makes another error of an interrupt."""
    (tmp_path / "pyarrow.py").write_text(
        "import sys\n"
        "print('loading', flush=True)\n"
        "try:\n    sys.stdin.read()\n"
        "except KeyboardInterrupt:\n    raise ImportError('half of it is there')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "dice_core", "pair", "--data", "d", "--policy", "p", "--output", "o"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == "dice: stopped; the same command goes on\n"


def test_repeated_options_add_up():
    words = "pair --data d --policy p --output o --scores a --scores b"
    words += " --set pairing.replay_ratio=0 --set pairing.num_eval_pairs=4"
    options = cli.build_parser().parse_args(words.split())
    assert options.scores_uris == ["a", "b"]
    assert options.set == ["pairing.replay_ratio=0", "pairing.num_eval_pairs=4"]


@pytest.mark.parametrize("text", ["", "[1]", '{"pairng": {}}', '{"pairing": 1}', "{", "[" * 100_000])
def test_a_config_file_of_another_form_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(text)
    arguments = ["--data", "d", "--policy", "p", "--output", "o", "--config", str(path)]
    code, _, err = run(capsys, "pair", *arguments)
    assert code == 1
    assert "c.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"pairing": {"num_eval_pairs": 5, "num_eval_pairs": 7}}', "num_eval_pairs"),
        ('{"chat": {}, "chat": {}}', "chat"),
    ],
)
def test_a_setting_that_a_config_file_names_twice_is_not_one_of_the_two(text, name, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"c.json: .*'{name}' stands there twice: keep one$"):
        cli.chosen_settings(STAGES["pair"], [], str(path))


def test_a_config_file_of_windows_is_read(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"pairing": {"replay_ratio": 0.2}}', "utf-8-sig")
    assert cli.chosen_settings(STAGES["pair"], [], str(path)) == {"pairing": {"replay_ratio": 0.2}}


@pytest.mark.parametrize(
    ("stage", "options", "fault"),
    [
        ("generate", "--num-shards 0", "num_shards must be at least 1, got 0"),
        ("generate", "--shard 2 --num-shards 2", "shard must be from 0 to 1, got 2"),
        ("generate", "--iteration 0", "iteration must be at least 1, got 0"),
        ("pair", "--iteration -1", "iteration must be at least 0, got -1"),
        ("pair", "--scores a b --responses c", "1 responses for 2 scores: give one for each, in order"),
        ("train", "--iteration -1", "iteration must be at least 0, got -1"),
        ("evaluate", "--iteration 0", "iteration must be at least 1, got 0"),
        ("report", "--num-iterations -1 --allow-empty", "num_iterations must be at least 0, got -1"),
        ("report", "", "report: give one of --run (ROOT/runs/NAME), --stages (addresses of stages) and --runs"),
        ("report", "--run r --stages a b", "report: give one of --run (ROOT/runs/NAME), --stages (addresses"),
        ("report", "--run a --runs b c", "report: give one of --run"),
        ("prepare-data", "--preferences=", "preferences_source: is empty"),
        ("import-model", "--source=", "source: is empty; allowed: a Hub id"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_read(stage, options, fault, capsys, tmp_path):
    """None of the addresses exists: what is out of range is told first."""
    given = options.replace("=", " ").split()
    usage = help_of(stage, capsys).partition("\n\n")[0]
    needed = re.findall(r"--[\w-]+", re.sub(r"\[.*?\]", "", usage, flags=re.DOTALL))
    addresses = [word for option in needed if option not in given for word in (option, str(tmp_path / "none"))]
    code, _, err = run(capsys, stage, *addresses, *options.split())
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"dice: error: {fault}")
    assert not any(tmp_path.iterdir())


def test_a_report_of_a_run_that_is_not_there_is_refused_unless_it_is_asked_for(capsys, tmp_path):
    arguments = ["--run", str(tmp_path / "nonesuch"), "--output", str(tmp_path / "out"), "--num-iterations", "2"]
    code, _, err = run(capsys, "report", *arguments)
    assert code == 1
    assert "nonesuch: no stage of a run has finished there: give the run's own place, ROOT/runs/NAME" in err
    assert not (tmp_path / "out").exists()
    assert run(capsys, "report", *arguments, "--allow-empty")[0] == 0
    assert "not started" in (tmp_path / "out" / "report.html").read_text()


def test_a_setting_without_its_section_is_one_line_with_the_section(capsys, tmp_path):
    arguments = ["--policy", "p", "--pairs", "d", "--output", str(tmp_path / "o"), "--set", "learning_rate=1e-6"]
    code, _, err = run(capsys, "train", *arguments)
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("dice: error: 'learning_rate=1e-6': did you mean training.learning_rate?")


def test_a_scratch_folder_that_is_missing_is_made_or_told(capsys, tmp_path, monkeypatch):
    arguments = ["--policy", str(tmp_path / "none"), "--data", str(tmp_path / "d"), "--output", str(tmp_path / "o")]
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "a" / "b"))
    assert "no manifest.json there" in run(capsys, "generate", *arguments)[2]
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "file" / "b"))
    code, _, err = run(capsys, "generate", *arguments)
    assert code == 1 and err.startswith(
        f"dice: error: DICE_SCRATCH: {tmp_path}/file/b cannot be made (Not a directory)"
    )


def test_a_report_names_a_result_that_lies_where_it_does_not_look(capsys, tmp_path):
    """Its page would be empty, as of a run that has made nothing."""
    run_uri = str(tmp_path / "run")
    for place, stage in (("data", "prepare-data"), ("responses", "generate")):
        publish_files(f"{run_uri}/{place}", {}, Manifest(stage=stage, fingerprint="f", files={}))
    code, _, err = run(capsys, "report", "--run", run_uri, "--output", f"{run_uri}/report", "--num-iterations", "1")
    assert code == 1 and err.count("\n") == 1
    assert "run/responses: holds the result of generate, and a report does not look there: give the addresses" in err
    assert f"{run_uri}/iteration-1/generate/shard-0-of-1" in err
    (tmp_path / "run" / "iteration-1" / "generate").mkdir(parents=True)
    shutil.move(f"{run_uri}/responses", f"{run_uri}/iteration-1/generate/shard-0-of-1")
    assert run(capsys, "report", "--run", run_uri, "--output", f"{run_uri}/report", "--num-iterations", "1")[0] == 0
