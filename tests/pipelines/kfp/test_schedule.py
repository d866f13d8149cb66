"""`make schedule` and `make unschedule` against a stand-in of KFP's API, which kills as the real one does."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from components.choose_inputs import choose_inputs
from dice_core.settings.base import ConfigError
from pipelines.cli import main
from pipelines.kfp.api import Connection, KfpApi
from pipelines.kfp.cron import check_cron, next_start
from pipelines.kfp.schedule import chosen_trigger, end_runs
from tests.cluster_objects import NAMESPACE, ClusterObjects, running_cluster
from tests.kfp_api import KfpServer, running_kfp_server

pytestmark = pytest.mark.slow

RECORDINGS = Path(__file__).parents[2] / "data" / "kfp-2.17.0"
PROMPTS = "s3://bucket/prompts/"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with running_kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.host)
        monkeypatch.setenv("DICE_ROOT", "s3://bucket/dice")
        yield server


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    with running_cluster({f"{NAMESPACE}/pods": []}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


def schedule(*arguments: str) -> int:
    return main(["schedule", "--preset", "demo", *arguments, "--set", "iterations=1"])


def start_run(server: KfpServer, schedule: str, state: str = "RUNNING", part: str = "0f2a9c1b") -> dict[str, Any]:
    """Add what the newest schedule of a name has started; its name in S3 ends in the part of the id."""
    identity = [row["recurring_run_id"] for row in server.recurring_runs if row["display_name"] == schedule][-1]
    row = {"run_id": f"{part}-77aa", "display_name": f"{schedule}zd87n-1-3187898008", "state": state}
    row |= {"recurring_run_id": identity, "created_at": "2026-01-01T00:00:00Z"}
    server.runs.append(row | {"runtime_config": {"parameters": {"run": schedule, "root": "s3://bucket/dice"}}})
    return server.runs[-1]


def statuses(server: KfpServer) -> list[tuple[str, str]]:
    return [(row["display_name"], row["status"]) for row in server.recurring_runs]


def test_a_schedule_has_one_run_at_a_time_and_catches_up_on_no_more_than_the_newest_tick(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schedule("--cron", "0 0 3 * * 1", "--prompts", PROMPTS) == 0
    (body,) = server.posted("/recurringruns")
    assert int(body["max_concurrency"]) == 1
    assert body["no_catchup"] is True
    assert body["mode"] == "ENABLE"
    assert body["service_account"] == "dice-pipeline"
    assert body["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    assert body["runtime_config"]["parameters"]["prompts_source"] == PROMPTS
    assert "/#/recurringrun/details/" in capsys.readouterr().out


def test_a_pipeline_that_is_made_has_a_description_in_the_list_of_the_ui(server: KfpServer) -> None:
    assert schedule("--every", "7d") == 0
    (pipeline,), (version,) = server.pipelines, server.versions
    assert pipeline["description"] == version["description"] != ""


def test_every_is_seconds(server: KfpServer) -> None:
    assert schedule("--every", "7d") == 0
    assert server.recurring_runs[0]["trigger"] == {"periodic_schedule": {"interval_second": 7 * 24 * 3600}}


def test_the_same_name_replaces_the_schedule(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--every", "7d", "--name", "weekly") == schedule("--every", "2d", "--name", "weekly") == 0
    (row,) = server.recurring_runs
    assert row["trigger"]["periodic_schedule"]["interval_second"] == 2 * 24 * 3600
    assert "replaced" in capsys.readouterr().out
    assert schedule("--every", "7d", "--name", "other") == 0
    assert {row["display_name"] for row in server.recurring_runs} == {"weekly", "other"}


def test_a_schedule_with_a_run_under_way_is_replaced_and_stays_disabled_until_the_run_has_ended(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schedule("--every", "7d", "--name", "weekly") == schedule("--every", "7d", "--name", "other") == 0
    run = start_run(server, "weekly")
    start_run(server, "weekly", "SUCCEEDED", "1f2a9c1b")
    start_run(server, "other", "RUNNING", "2f2a9c1b")
    assert "of the replaced schedule" not in capsys.readouterr().err
    assert schedule("--every", "2d", "--name", "weekly") == 0
    assert server.killed == []
    assert statuses(server) == [("weekly", "DISABLED"), ("other", "ENABLED"), ("weekly", "ENABLED")]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run weekly-0f2a9c1b: under way, of the replaced schedule, which stays until it has ended")
    assert "make cancel RUN=weekly-0f2a9c1b" in line
    run["state"] = "FAILED"
    assert schedule("--every", "3d", "--name", "weekly") == 0
    assert server.killed == []
    assert statuses(server) == [("other", "ENABLED"), ("weekly", "ENABLED")]
    assert capsys.readouterr().err == ""


def test_a_schedule_that_is_refused_leaves_the_old_one(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--every", "7d") == 0
    num_calls = len(server.requests)
    assert schedule("--every", "7d") == 0
    before = [row["recurring_run_id"] for row in server.recurring_runs]
    calls = [(method, path) for method, path, _ in server.requests[num_calls:]]
    server.faults = [None] * calls.index(("POST", "/recurringruns")) + [500]
    assert schedule("--every", "1d") == 1
    assert [row["recurring_run_id"] for row in server.recurring_runs] == before
    assert "HTTP 500" in capsys.readouterr().err


def test_each_run_chooses_its_name_its_policy_and_its_prompts(server: KfpServer) -> None:
    assert schedule("--every", "7d", "--prompts", PROMPTS) == 0
    spec = server.versions[0]["pipeline_spec"]["pipeline_spec"]
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    # check-settings writes them down for the tasks after it.
    chosen = {
        name: value["taskOutputParameter"]["outputParameterKey"]
        for name, value in tasks["check-settings"]["inputs"]["parameters"].items()
        if value.get("taskOutputParameter", {}).get("producerTask") == "choose-inputs"
    }
    assert chosen == {name: name for name in ("run", "policy_source", "reference_source", "prompts_source")}
    job = {"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}
    assert tasks["choose-inputs"]["inputs"]["parameters"]["job_id"] == job
    assert spec["root"]["dag"]["tasks"]["report"]["inputs"]["parameters"]["job_id"] == job


def test_a_recurring_run_has_no_warm_start(server: KfpServer) -> None:
    assert schedule("--every", "7d") == 0
    spec = server.versions[0]["pipeline_spec"]["pipeline_spec"]
    names = {task["taskInfo"]["name"] for task in spec["components"]["comp-exit-handler-1"]["dag"]["tasks"].values()}
    assert {"choose inputs", "import policy", "import reference"} <= names
    assert not {name for name in names if name.startswith("warm start")}


def test_unschedule_deletes_and_names_what_there_is(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--every", "7d", "--name", "weekly") == 0
    assert main(["unschedule", "--name", "wekly"]) == 1
    assert "none called 'wekly'; there are: weekly" in capsys.readouterr().err
    assert main(["unschedule", "--name", "weekly"]) == 0
    assert server.recurring_runs == []


def test_unschedule_kills_no_run_under_way(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The recorded run is the one whose schedule was deleted, with its workflow, while it ran."""
    assert schedule("--every", "7d", "--name", "again") == 0
    run = json.loads((RECORDINGS / "run-of-deleted-schedule.json").read_text())
    server.recurring_runs[0]["recurring_run_id"] = run["recurring_run_id"]
    server.runs = [run]
    capsys.readouterr()
    assert main(["unschedule", "--name", "again"]) == 1
    assert (server.killed, statuses(server)) == ([], [("again", "DISABLED")])
    (line,) = capsys.readouterr().err.splitlines()
    assert "schedule again: starts no more runs, but stays, disabled: deleting it would kill again-6a003629" in line
    assert line.endswith("make unschedule again; FORCE=1 ends it now")
    run["state"] = "SUCCEEDED"
    assert main(["unschedule", "--name", "again"]) == 0
    assert (server.killed, statuses(server)) == ([], [])


def test_force_ends_the_run_and_then_deletes_the_schedule(
    server: KfpServer, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schedule("--every", "7d", "--name", "weekly") == 0
    run = start_run(server, "weekly")
    # Read once to stop it, once more for its training; then it has ended, as Argo reports it.
    server.script = [{}, {}, {"state": "FAILED"}]
    assert main(["unschedule", "--name", "weekly", "--force"]) == 0
    assert (run["state"], server.killed, statuses(server)) == ("FAILED", [], [])
    printed = capsys.readouterr().out
    assert "run weekly-0f2a9c1b: is being stopped" in printed and "schedule weekly: deleted" in printed


def test_a_run_that_never_ends_is_waited_for_no_longer_than_patience(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one whose workflow somebody has deleted: KFP says RUNNING for ever."""
    assert schedule("--every", "7d", "--name", "weekly") == 0
    run, stopped = start_run(server, "weekly"), list[str]()
    api = KfpApi(Connection(server.host))
    end_runs(api, {run["run_id"]: "w"}, lambda _, name: stopped.append(name), patience=0.0, pause=0.01)
    assert stopped == ["w"] and "not ended after 0 s: w" in capsys.readouterr().err


def test_unschedule_without_a_name_deletes_nothing(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--every", "7d", "--name", "weekly") == 0
    assert main(["unschedule", "--name", ""]) == 1
    assert "NAME= is needed, the name of a schedule; there are: weekly" in capsys.readouterr().err
    assert len(server.recurring_runs) == 1


def test_a_dry_run_sends_nothing(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--cron", "0 0 3 * * 1", "--dry-run") == 0
    assert "at '0 0 3 * * 1'" in capsys.readouterr().out and server.requests == []


def test_a_cron_of_five_fields_is_refused_with_its_corrected_form() -> None:
    with pytest.raises(ConfigError, match=r"write '0 0 3 \* \* 1'"):
        check_cron("0 3 * * 1")


@pytest.mark.parametrize(
    ("cron", "every", "message"),
    [
        ("", "", "give either CRON="),
        ("0 0 3 * * 1", "7d", "give either CRON="),
        ("0 0 3 * *  * 1", "", "must have the six fields second, minute, hour"),
        ("@every 7d", "", "must have the six fields"),
        ("* 0 3 * * 1", "", "less than an hour apart, the second must be one number: write '0 0 3 * * 1'"),
        ("0 * * * * *", "", "less than an hour apart, the minute must be one number: write '0 0 * * * *'"),
        ("0 0,30 3 * * 1", "", "the minute must be one number: write '0 0 3 * * 1'"),
        ("0 61 25 * * 9", "", "the minute must be from 0 to 59, or a list, range or step of these, got '61'"),
        ("0 0 25 * * 1", "", "the hour must be from 0 to 23"),
        ("0 0 3 0 * *", "", "the day of the month must be from 1 to 31"),
        ("0 0 3 * jam *", "", "the month must be from 1 to 12"),
        ("0 0 3 * * 7", "", "the day of the week must be from 0 to 6"),
        ("0 0 5-3 * * *", "", "the hour must be from 0 to 23"),
        ("0 0 */0 * * *", "", "the hour must be from 0 to 23"),
        ("", "week", "every: must be a whole number and one of s, m, h, d, such as 30m, 12h or 7d"),
        ("", "10m", "every: must be an hour at least"),
        ("", "367d", "every: must be a year (366d) at most"),
        ("", "9999d", "every: must be a year (366d) at most"),
        ("0 0 3 31 2 *", "", "cron: no such day comes within five years"),
        ("0 0 3 31 4,6,9,11 *", "", "cron: no such day comes within five years"),
        ("0 0 3 30,31 FEB ?", "", "cron: no such day comes within five years"),
        # A star with a step does not restrict the weekday: both must match.
        ("0 0 3 31 2 */2", "", "cron: no such day comes within five years"),
    ],
)
def test_other_times_are_refused(cron: str, every: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_trigger(cron, every)
    assert message in str(caught.value)


@pytest.mark.parametrize("cron", ["0 0 3 * * 1", "0 30 */6 ? * MON-FRI", "0 0 3,15 1-31/2 jan,Jul *", "5 59 23 * 12 0"])
def test_other_expressions_of_six_fields_are_taken(cron: str) -> None:
    assert check_cron(f" {cron} ") == cron


@pytest.mark.parametrize("cron", ["0 0 3 31 2 1", "0 0 3 31 2,3 *", "0 0 3 29 2 *"])
def test_a_day_that_comes_seldom_or_on_a_weekday_instead_is_taken(cron: str) -> None:
    assert check_cron(cron) == cron


def test_a_word_stands_for_its_fields() -> None:
    assert check_cron("@weekly") == "0 0 0 * * 0" and check_cron("@hourly") == "0 0 * * * *"


@pytest.mark.parametrize(
    ("cron", "first"),
    [
        ("0 0 3 * * 1", (2026, 3, 9, 3, 0)),
        ("0 30 4 29 2 *", (2028, 2, 29, 4, 30)),
        # The first of the month or a Friday, whichever comes first.
        ("0 0 3 1 * FRI", (2026, 3, 6, 3, 0)),
        # Fridays alone: the next step would be behind Saturday, the last day of the week.
        ("0 0 3 ? 4 5/2", (2026, 4, 3, 3, 0)),
        ("0 0 3 5 4 5/2", (2026, 4, 3, 3, 0)),
    ],
)
def test_the_first_start_is_told(cron: str, first: tuple[int, ...]) -> None:
    # 2026-03-05 is a Thursday.
    assert next_start(cron, datetime(2026, 3, 5, 12, tzinfo=UTC)) == datetime(*first, tzinfo=UTC)  # type: ignore[misc]


def test_a_name_leaves_room_for_the_part_of_an_id_that_a_run_adds(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schedule("--every", "7d", "--name", "x" * 55) == 1
    assert "and 9 characters more, 63 at most: shorten it to 54, got 55" in capsys.readouterr().err
    assert server.requests == []
    assert schedule("--every", "7d", "--name", "x" * 54) == 0


@pytest.mark.parametrize("prompts", ["/data/prompts/", "s3://", "s3:///prompts/"])
def test_prompts_must_be_on_s3(server: KfpServer, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("--every", "7d", "--prompts", prompts) == 1
    assert "prompts: no address on S3, write s3://bucket/prefix" in capsys.readouterr().err


def test_the_choice_is_what_the_component_returns(tmp_path: Path) -> None:
    sources = {"policy_source": "org/dpo", "reference_source": "org/sft", "prompts_source": "s3://b/p.jsonl"}
    chosen = choose_inputs.python_func(
        root=str(tmp_path), name="nightly", job_id="3f2a9c1b-77aa", promote_as="zephyr", **sources
    )
    assert chosen == ("nightly-3f2a9c1b", "org/dpo", "org/sft", "s3://b/p.jsonl")
