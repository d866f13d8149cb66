"""W&B: when it is asked for; and its real package, offline, in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dice_core.tracking import wandb_run
from dice_core.tracking.run_tracking import tracked_training
from tests.mlflow_server import ROOT, python_of

# Runs in W&B's environment, where nothing of ours is installed but what PYTHONPATH finds.
_TRAINING = """
import sys
from pathlib import Path
from dice_core.tracking.feed import Feed, Line
from dice_core.tracking.wandb_run import WandbRun

settings = {"training": {"beta": 0.1}, "seed": 7}
feed = Feed(WandbRun("zephyr-1", "iteration-1/train", "s3://b/x\\nabc", settings, Path(sys.argv[1])))
for step, loss in enumerate([0.75, 0.5, 0.25]):
    feed.put(Line(step, {"loss": loss, "rewards/margins": 1.5}))
feed.end("FINISHED", {"last_loss": 0.25}, seconds=120)
"""

# A file of W&B is LevelDB's log of messages: 7 bytes, then chunks of a checksum, a length, and a kind (1: a whole one).
_READER = """
import json, sys
from wandb.proto.wandb_internal_pb2 import Record

data, start, found = open(sys.argv[1], "rb").read(), 7, {"history": [], "summary": {}}
while start + 7 <= len(data):
    length, kind = int.from_bytes(data[start + 4 : start + 6], "little"), data[start + 6]
    assert kind == 1, kind
    record = Record.FromString(data[start + 7 : start + 7 + length])
    start += 7 + length
    read = lambda items: {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    if record.HasField("run"):
        run = record.run
        found |= {"id": run.run_id, "group": run.run_group, "name": run.display_name, "project": run.project}
        found["config"] = read(run.config.update)
    elif record.HasField("history"):
        found["history"].append(read(record.history.item))
    elif record.HasField("summary"):
        found["summary"] |= read(record.summary.update)
    elif record.HasField("exit"):
        found["exit"] = record.exit.exit_code
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_training_is_a_run_in_the_group_of_its_run_with_its_curves_and_settings(tmp_path: Path) -> None:
    python = python_of(ROOT / "tests" / "wandb.lock")
    variables = {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}

    def run(code: str, argument: Path) -> str:
        command = [python, "-c", code, argument]
        return subprocess.run(
            command, env={**os.environ, **variables}, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    run(_TRAINING, tmp_path / "files")
    (file,) = (tmp_path / "files").rglob("*.wandb")
    found: dict[str, Any] = json.loads(run(_READER, file))
    assert (found["group"], found["name"], found["project"]) == ("zephyr-1", "iteration-1/train", "dice")
    assert {"training": {"beta": 0.1}, "seed": 7}.items() <= found["config"].items()
    curve = [(line["_step"], line["loss"], line["rewards/margins"]) for line in found["history"]]
    assert curve == [(0, 0.75, 1.5), (1, 0.5, 1.5), (2, 0.25, 1.5)]
    assert found["summary"]["last_loss"] == 0.25
    assert found["exit"] == 0


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"WANDB_API_KEY": "k"}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_PROJECT": "p"}, True),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, False),
        ({"WANDB_PROJECT": "p", "WANDB_DISABLED": "true"}, False),
        ({"WANDB_ENTITY": "team"}, False),
    ],
)
def test_its_own_variables_ask_for_it(variables: dict[str, str], wanted: bool) -> None:
    assert wandb_run.is_wanted(variables) == wanted


def test_without_its_package_a_training_says_so_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracked_training(str(tmp_path / "train"), "abc", {}, tmp_path / "scratch") as tracked:
        tracked.put(0, {"loss": 0.5})
        tracked.feeds[-1]._thread.join(60)
    told = capfd.readouterr().err
    assert told.count("wandb: its variables are set and its package is not installed") == 1
    assert told.count(" wandb: ") == 1
