"""Which lines of a pod's log are the stage's own."""

from pipelines.cluster.log_lines import own_lines

LOG = """\
time="2026-11-28T23:12:40.101Z" level=info msg="capturing logs" argo=true
I1128 23:12:40.310012      15 launcher_v2.go:151] input ExecutorInput:{
  "inputs": {}
}
[KFP Executor 2026-11-28 23:12:42,910 INFO]: Looking for component `pair` in --component_module_path `/tmp/c.py`
[KFP Executor 2026-11-28 23:12:42,911 INFO]: Got executor_input:
{
    "inputs": {
        "parameterValues": {
            "run": "x"
        }
    }
}
23:12:43 pair: 18 generated pairs
{
the stage's own brace
}
W1128 23:12:45.502999      15 launcher_v2.go:845] Failed to upload output artifacts: i/o timeout
time="2026-11-28T23:12:45.600Z" level=warning msg="cannot save outputs" argo=true
[KFP Executor 2026-11-28 23:12:45,700 INFO]: Wrote executor output file to /tmp/kfp/outputs/metadata.json.
I1128 23:12:46.502999      15 launcher_v2.go:181] publish success.
I1128 23:12:46.529018      15 client.go:738] Attempting to update DAG state
F1128 23:12:46.552240      15 main.go:53] failed to execute component: exit status 1
time=2026-11-28T23:12:47.490Z level=INFO msg="sub-process exited" argo=true error=<nil>
Error: exit status 1
"""


def test_lines_of_kfp_and_argo_are_left_out_unless_they_report_a_fault() -> None:
    assert list(own_lines(LOG.splitlines())) == [
        "23:12:43 pair: 18 generated pairs",
        "{",
        "the stage's own brace",
        "}",
        "W1128 23:12:45.502999      15 launcher_v2.go:845] Failed to upload output artifacts: i/o timeout",
        'time="2026-11-28T23:12:45.600Z" level=warning msg="cannot save outputs" argo=true',
        "F1128 23:12:46.552240      15 main.go:53] failed to execute component: exit status 1",
    ]


def test_a_log_that_ends_within_the_inputs_shows_nothing_of_them() -> None:
    cut = LOG[: LOG.index('"run"')]
    assert list(own_lines(cut.splitlines())) == []


def test_a_stage_that_writes_nothing_but_its_own_lines_keeps_them_all() -> None:
    lines = ["time: 5 s", "[KFP is slow]", "I am here", "Error: exit status", ""]
    assert list(own_lines(lines)) == lines
