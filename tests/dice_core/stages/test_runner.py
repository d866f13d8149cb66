"""A stage runs once for the same settings and inputs, resumes what was interrupted, and never mixes."""

import errno
import os
from dataclasses import replace

import pyarrow as pa
import pytest

from dice_core.data import records
from dice_core.generation.settings import GenerationConfig
from dice_core.stages.parts import read_input
from dice_core.stages.report import report
from dice_core.stages.runner import open_input, run_stage
from dice_core.stages.table import GENERATE, PAIR, TRAIN
from dice_core.storage.address import open_storage
from dice_core.storage.contract import NoAccessError, StorageError
from dice_core.storage.manifest import Manifest, clear_stage, publish_files, read_manifest, require_manifest
from tests.faulty_store import line_to

# Its inputs are those of all the stages that it stands for here.
STAGE = replace(GENERATE, inputs={**TRAIN.inputs, **PAIR.inputs})
PROMPTS = pa.table({"prompt_id": ["a"], "prompt": ["Hi"]})


class Work:
    """A stage's work that writes two parts and can be killed after the first."""

    def __init__(self, num_before_kill=2):
        self.num_before_kill, self.done = num_before_kill, []

    def __call__(self, context):
        for index in range(2):
            name = f"part-{index}.parquet"
            if name in context.parts:
                continue
            if len(self.done) == self.num_before_kill:
                raise KeyboardInterrupt
            records.write_table(PROMPTS, records.PROMPTS, context.folder / name)
            context.publish_part(name, context.folder / name)
            self.done.append(index)
        return context.publish({}, {"num_rows": 2})


def run(uri, work, *, settings=None, inputs=None, seed=0, format_version=1, overwrite=False):
    return run_stage(
        replace(STAGE, format_version=format_version),
        uri,
        work,
        settings={"generation": settings or GenerationConfig()},
        arguments={"seed": seed},
        inputs=inputs or {},
        overwrite=overwrite,
    )


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "out")


def test_what_reads_ahead_is_closed_when_the_work_fails_and_before_its_folder_goes(uri):
    seen = []

    def work(context):
        def values():
            try:
                yield 1
            finally:
                seen.append(context.folder.exists())

        next(context.until_end(values()))
        raise records.RecordError("broken")

    with pytest.raises(records.RecordError, match="broken"):
        run(uri, work)
    assert seen == [True]


def test_the_same_stage_again_returns_at_once_with_the_same_metrics(uri):
    first, again = Work(), Work()
    assert run(uri, first).status == "completed"
    report = run(uri, again)
    assert (report.status, report.metrics, again.done) == ("already complete", {"num_rows": 2}, [])


def test_a_killed_stage_resumes_at_its_next_part(uri):
    killed, resumed = Work(num_before_kill=1), Work()
    with pytest.raises(KeyboardInterrupt):
        run(uri, killed)
    assert read_manifest(uri) is None
    assert run(uri, resumed).status == "completed"
    assert (killed.done, resumed.done) == ([0], [1])
    assert [name.split("-")[1] for name in sorted(read_manifest(uri).files)] == ["0", "1"]


def test_other_settings_at_the_same_place_are_refused_and_named(uri):
    run(uri, Work())
    with pytest.raises(StorageError, match=r"generation.temperature was 0.7, now 0.9\): take a new run name"):
        run(uri, Work(), settings=GenerationConfig(temperature=0.9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, r"\(seed was 0, now 1\)"),
        ({"format_version": 2}, r"\(inputs, or the version: made by .*, this is"),
    ],
)
def test_another_seed_or_format_at_the_same_place_is_refused_and_named(uri, change, said):
    run(uri, Work())
    with pytest.raises(StorageError, match=said):
        run(uri, Work(), **change)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_place_of_another_stage_is_refused_as_such(uri, tmp_path, overwrite):
    publish_files(uri, {}, Manifest(stage="import-model", fingerprint="f", files={}))
    with pytest.raises(StorageError, match=r"out: holds the result of import-model, which generate leaves alone"):
        run(uri, Work(), overwrite=overwrite)
    with pytest.raises(StorageError, match=r"out: holds the result of import-model, which report leaves alone"):
        report(run_uri=str(tmp_path), output_uri=uri, num_iterations=1, allow_empty=True)
    assert read_manifest(uri).stage == "import-model"


def test_operational_settings_may_change_between_attempts(uri):
    with pytest.raises(KeyboardInterrupt):
        run(uri, Work(num_before_kill=1))
    assert run(uri, Work(), settings=GenerationConfig(gpu_memory_utilization=0.5)).status == "completed"


def test_what_ran_a_stage_is_recorded_and_another_attempt_may_be_run_by_something_else(uri):
    def on(num_devices):
        def work(context):
            context.ran_by |= {"runner": "in-process", "devices_per_model": num_devices}
            return Work(num_before_kill=num_devices)(context)

        return work

    with pytest.raises(KeyboardInterrupt):
        run(uri, on(1))
    run(uri, on(2))
    manifest = require_manifest(uri)
    assert manifest.ran_by == {"runner": "in-process", "devices_per_model": 2}
    assert replace(manifest, ran_by={}).content_digest == manifest.content_digest
    assert run(uri, on(8)).status == "already complete"


def test_an_input_that_changed_is_refused(uri, tmp_path):
    source = str(tmp_path / "in")
    run(source, Work())
    run(uri, Work(), inputs={"responses": source})
    clear_stage(source, "generate")
    run(source, lambda context: context.publish({}, {}))
    with pytest.raises(StorageError, match="inputs, or the version"):
        run(uri, Work(), inputs={"responses": source})


def test_an_unfinished_input_is_refused_before_any_work(uri, tmp_path):
    work = Work()
    with pytest.raises(StorageError, match="`dice prepare-data` has not finished, or the address is wrong"):
        run(uri, work, inputs={"data": str(tmp_path / "nothing")})
    assert work.done == []


def test_a_file_where_a_stages_result_is_needed_is_named_with_that_stage(uri, tmp_path):
    (tmp_path / "ok.jsonl").write_text("{}")
    with pytest.raises(StorageError, match=r"ok\.jsonl: a file, where the result of `dice prepare-data` is needed"):
        run(uri, Work(), inputs={"data": str(tmp_path / "ok.jsonl")})
    with pytest.raises(StorageError, match=r"ok\.jsonl: a file, where the result of `dice score` is needed"):
        run(uri, Work(), inputs={"scores/0": str(tmp_path / "ok.jsonl")})


def test_the_result_of_another_stage_is_no_input(uri, tmp_path):
    """Two addresses that were mixed up are told before a model is loaded or a training is launched."""
    run(str(tmp_path / "responses"), Work())
    with pytest.raises(StorageError, match=r"responses: holds the result of generate, where that of `dice pair` is"):
        run(uri, Work(), inputs={"pairs": str(tmp_path / "responses")})
    with pytest.raises(StorageError, match=r"`dice import-model`, `dice train` or `dice extrapolate` is needed"):
        run(uri, Work(), inputs={"policy": str(tmp_path / "responses")})


def test_a_skipped_stage_makes_those_after_it_skip_with_the_same_reason(uri, tmp_path):
    last, work = str(tmp_path / "last"), Work()
    assert run(uri, lambda context: context.skip("refused: too long")).status == "skipped"
    report = run(last, work, inputs={"responses": uri})
    assert (report.status, report.message, work.done) == ("skipped", "refused: too long", [])
    assert run(last, work, inputs={"responses": uri}).status == "skipped"


def test_overwrite_deletes_what_was_there(uri):
    run(uri, Work())
    assert run(uri, Work(), seed=1, overwrite=True).status == "completed"
    assert {found.key.split("-")[0] for found in open_storage(uri).list()} == {"part", "manifest.json"}


def test_overwrite_deletes_nothing_when_an_input_is_wrong(uri, tmp_path):
    run(uri, Work())
    with pytest.raises(StorageError, match="has not finished"):
        run(uri, Work(), inputs={"data": str(tmp_path / "nothing")}, overwrite=True)
    assert run(uri, Work()).status == "already complete"


def test_a_place_that_cannot_be_written_is_refused_before_any_work(s3, object_store, monkeypatch):
    work = Work()
    with line_to(object_store, monkeypatch) as line:
        line.denied = b"PUT "
        with pytest.raises(
            NoAccessError, match=r"denied/\.probe: .* denies PutObject with these credentials: grant it"
        ):
            run(f"{s3}/denied", work)
        assert work.done == []
        line.denied = b""
        assert run(f"{s3}/denied", work).status == "completed"
        # What is there already needs no right to write.
        line.denied = b"PUT "
        assert run(f"{s3}/denied", work).status == "already complete"


def test_a_scratch_disk_that_fills_up_is_told_with_what_to_set(uri):
    def work(context):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"its disk is full .* or DICE_SCRATCH \(all other files"):
        run(uri, work)


def test_an_input_made_from_something_else_is_refused(uri, tmp_path):
    first, second, made = (str(tmp_path / name) for name in ("first", "second", "made"))
    run(first, Work())
    run(second, lambda context: context.publish({}, {}))
    run(made, Work(), inputs={"responses": first})
    scores = open_input(made, ["generate"], tmp_path)
    scores.require_same("responses", open_input(first, ["generate"], tmp_path))
    with pytest.raises(StorageError, match=r"made with responses .*first, which is not what lies at .*second"):
        scores.require_same("responses", open_input(second, ["generate"], tmp_path))


def test_a_parquet_file_of_the_users_is_an_input_by_its_content(tmp_path):
    path = tmp_path / "mine.parquet"
    records.write_table(PROMPTS, records.PROMPTS, path)
    source = open_input(str(path), ["prepare-data"], tmp_path / "in")
    assert source.tables() == ["mine.parquet"]
    assert source.manifest.files["mine.parquet"].num_rows == 1


def test_a_parquet_file_of_the_users_is_downloaded_once(tmp_path, uri):
    path = tmp_path / "mine.parquet"
    records.write_table(PROMPTS, records.PROMPTS, path)

    def work(context):
        # It was downloaded to identify it, and cannot be now.
        path.rename(tmp_path / "elsewhere")
        for _ in range(2):
            assert (
                read_input(context, context.inputs["data"], records.PROMPTS, "prompts").to_pylist()
                == PROMPTS.to_pylist()
            )
        (tmp_path / "elsewhere").rename(path)
        return context.publish({}, {})

    run(uri, work, inputs={"data": str(path)})
    assert path.is_file()


def test_a_stage_deletes_what_killed_uploads_left_at_its_place(tmp_path, uri):
    old, young = (tmp_path / "out" / f".model.{name}.unfinished" for name in ("old", "young"))
    for path in (old, young):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    run(uri, Work())
    assert (old.exists(), young.exists()) == (False, True)


def test_unfinished_uploads_that_cannot_be_looked_for_stop_no_stage(tmp_path, uri, capsys):
    """A bucket may deny it; a folder may hold a name that leads nowhere."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".model.0123.unfinished").symlink_to(".model.0123.unfinished")
    assert run(uri, Work()).status == "completed"
    assert "uploads that were never finished are not looked for: " in "".join(capsys.readouterr())
