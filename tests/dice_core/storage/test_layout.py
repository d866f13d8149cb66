"""Keys are deterministic and refuse names that S3 or Kubernetes would not take."""

import pytest

from dice_core.storage import layout


def test_the_places_of_a_run():
    run = layout.run("s3://bucket/prefix/", "july")
    assert run == "s3://bucket/prefix/runs/july"
    assert layout.shard(run, 2, "generate", 0, 8) == f"{run}/iteration-2/generate/shard-0-of-8"
    assert layout.stage(run, 1, "pair") == f"{run}/iteration-1/pair"
    assert layout.warm_start(run, "train") == f"{run}/warm-start/train"
    assert (
        layout.model("s3://bucket", "HuggingFaceH4/zephyr-7b-beta")
        == "s3://bucket/models/huggingfaceh4--zephyr-7b-beta"
    )
    assert layout.promoted("s3://bucket", "zephyr") == "s3://bucket/promoted/zephyr.json"


def test_an_imported_model_is_named_by_its_source_and_one_of_a_run_stays_in_place():
    root = "s3://bucket/dice"
    assert layout.imported_model(root, "org/Model") == f"{root}/models/org--model"
    assert layout.imported_model(root, "/data/models/a.gguf") == f"{root}/models/models--a.gguf"
    assert layout.imported_model(root, "s3://other/models/zephyr/") == f"{root}/models/models--zephyr"
    trained = layout.stage(layout.run(root, "july"), 2, "train")
    assert layout.imported_model(root, trained) == layout.imported_model(root, f"{trained}/") == trained


@pytest.mark.parametrize("name", ["", "July", "a/b", "-a", "a-", "x" * 64, "a b"])
def test_a_run_name_that_is_no_key_or_label_is_refused(name):
    with pytest.raises(ValueError, match="run must be 1 to 63 lower-case letters"):
        layout.run("s3://bucket", name)


def test_iterations_count_from_one_and_shards_from_zero():
    with pytest.raises(ValueError, match="iteration must be at least 1, got 0"):
        layout.stage("r", 0, "pair")
    with pytest.raises(ValueError, match="shard must be from 0 to 7, got 8"):
        layout.shard("r", 1, "score", 8, 8)
    with pytest.raises(ValueError, match="num_shards must be at least 1, got 0"):
        layout.shard("r", 1, "score", 0, 0)


def test_an_address_on_s3_has_a_bucket():
    assert layout.check_s3("s3://bucket/a/b", "root") == ("bucket", "a/b")
    assert layout.check_s3("s3://bucket", "root") == ("bucket", "")
    for uri in ("s3://", "s3:///x", "s3:/bucket/x", "/data", ""):
        with pytest.raises(ValueError, match="root: no address on S3, write s3://bucket/prefix"):
            layout.check_s3(uri, "root")


@pytest.mark.parametrize("bucket", ["b", "Bucket", "-bucket", "b" * 64, "my bucket"])
def test_a_name_that_no_bucket_can_have_is_refused_by_its_rule(bucket):
    with pytest.raises(ValueError, match=f"root: no bucket can be called '{bucket}': a name has 3 to 63"):
        layout.check_s3(f"s3://{bucket}/x", "root")


def test_a_run_is_recognised_by_an_address_below_it():
    run_uri = layout.run("s3://bucket/runs/dice", "zephyr-1")
    assert layout.run_of(layout.stage(run_uri, 1, "train")) == "zephyr-1"
    assert layout.run_of("s3://bucket/policy/train") == ""


@pytest.mark.parametrize(
    ("place", "stage", "iteration", "shard"),
    [
        ("iteration-12/score/shard-3-of-8", "score", 12, (3, 8)),
        ("iteration-1/train", "train", 1, None),
        ("warm-start/pair", "pair", 0, None),
        ("data", "data", None, None),
    ],
)
def test_a_place_below_a_run_says_its_stage_its_iteration_and_its_shard(
    place: str, stage: str, iteration: int | None, shard: tuple[int, int] | None
) -> None:
    assert layout.parse_place(place) == layout.StagePlace(stage, iteration, shard)
    assert layout.is_stage(place)


@pytest.mark.parametrize("place", ["", "iteration-1", "iteration-1/", "warm-start", "iteration-x/train", "a/b", "d1"])
def test_what_is_no_place_of_a_stage_is_none(place: str) -> None:
    assert layout.parse_place(place) is None
    assert not layout.is_stage(place)
