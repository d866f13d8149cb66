"""Tables are read ahead of the work and stored behind it."""

import threading
from dataclasses import replace

import pyarrow as pa
import pytest

from dice_core.data import records
from dice_core.stages.parts import group_tables, part_name, published_behind
from dice_core.stages.runner import run_stage
from dice_core.stages.table import GENERATE, PAIR
from dice_core.storage.contract import StorageError
from dice_core.storage.folder import FolderStorage
from dice_core.storage.manifest import Manifest, publish_files, publish_part

WAIT_SECONDS = 30


def prompts(name):
    return pa.table({"prompt_id": [name], "prompt": [f"Tell me of {name}"]}, schema=records.PROMPTS)


STAGE = replace(GENERATE, inputs=PAIR.inputs)


def run(uri, work, inputs=None):
    return run_stage(STAGE, uri, work, settings={}, arguments={}, inputs=inputs or {})


def test_parts_are_stored_while_the_next_is_made_and_not_read_again(tmp_path, monkeypatch):
    used, stored, downloaded, is_next_made = {}, [], [], threading.Event()
    upload, download = FolderStorage.upload, FolderStorage.download

    def late_upload(self, path, key):
        assert is_next_made.wait(WAIT_SECONDS)
        upload(self, path, key)
        stored.append(key)

    monkeypatch.setattr(FolderStorage, "upload", late_upload)
    monkeypatch.setattr(FolderStorage, "download", lambda *arguments: downloaded.append(download(*arguments)))

    def work(context):
        with published_behind(context, records.PROMPTS, used.__setitem__) as publish:
            publish(0, prompts("0"))
            assert not stored
            is_next_made.set()
            publish(1, prompts("1"))
        return context.publish({}, {})

    run(str(tmp_path / "out"), work)
    assert {name: table["prompt_id"].to_pylist() for name, table in used.items()} == {
        part_name(0): ["0"],
        part_name(1): ["1"],
    }
    assert (len(stored), downloaded) == (2, [])


def test_the_part_of_an_attempt_at_the_same_time_is_the_one_that_is_used(tmp_path):
    uri, used = str(tmp_path / "out"), {}

    def work(context):
        path = tmp_path / part_name(0)
        records.write_table(prompts("theirs"), records.PROMPTS, path)
        publish_part(uri, part_name(0), path, context.fingerprint)
        with published_behind(context, records.PROMPTS, used.__setitem__) as publish:
            publish(0, prompts("ours"))
        return context.publish({}, {})

    run(uri, work)
    assert used[part_name(0)]["prompt_id"].to_pylist() == ["theirs"]


def test_a_part_that_cannot_be_stored_stops_the_stage(tmp_path, monkeypatch):
    def refuse(*_):
        raise StorageError("the disk is full")

    monkeypatch.setattr(FolderStorage, "upload", refuse)
    made = []

    def work(context):
        with published_behind(context, records.PROMPTS, lambda *_: None) as publish:
            for index in range(5):
                made.append(index)
                publish(index, prompts(f"{index}"))
        return context.publish({}, {})

    with pytest.raises(StorageError, match="the disk is full"):
        run(str(tmp_path / "out"), work)
    assert len(made) == 2


def test_tables_of_many_shards_come_in_order_and_their_ways_overlap(tmp_path, monkeypatch):
    """A download ends only when four are under way."""
    num_shards, num_parts = 2, 12
    inputs = {}
    for shard in range(num_shards):
        files = {}
        for index in range(num_parts):
            files[part_name(index)] = tmp_path / f"{shard}-{index}.parquet"
            records.write_table(prompts(f"{shard}/{index}"), records.PROMPTS, files[part_name(index)])
        inputs[f"responses/{shard}"] = str(tmp_path / f"shard-{shard}")
        publish_files(inputs[f"responses/{shard}"], files, Manifest(stage="generate", fingerprint="", files={}))
    meeting, download, found = threading.Barrier(4, timeout=WAIT_SECONDS), FolderStorage.download, []

    def meet(self, key, path):
        meeting.wait()
        download(self, key, path)

    def work(context):
        with monkeypatch.context() as patch:
            patch.setattr(FolderStorage, "download", meet)
            found.extend(table["prompt_id"][0].as_py() for table in group_tables(context, "responses", records.PROMPTS))
        return context.publish({}, {})

    run(str(tmp_path / "out"), work, inputs)
    assert found == [f"{shard}/{index}" for shard in range(num_shards) for index in range(num_parts)]
