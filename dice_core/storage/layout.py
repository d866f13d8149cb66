"""Every place a run writes to, in one module. Names are deterministic: a retried task finds what it left.

    ROOT/                                      s3://bucket/prefix, or a folder
      models/<name>/                           imported models, shared by runs
      promoted/<name>.json                     pointer to the last policy that passed its gate
      promoted/<name>.history/                 what moved it, an entry a step
      runs/<run>/
        check-settings/                        what the run was last started with, and its settings for the tasks
        choose-inputs/                         of a recurring run: what it chose
        import-model/<name>/                   only why it failed
        data/                                  prompts, preferences, held_out
        warm-start/{pair,train}/
        iteration-<t>/
          generate/shard-<i>-of-<n>/
          score/shard-<i>-of-<n>/
          pair/  train/  evaluate/
          alpaca-eval/  alpaca-scores/         where a person has asked for them
        report/

Each of these folders belongs to one stage, which writes `manifest.json` there last. Where its last attempt failed,
`failure.json` says why.
"""

import re
from dataclasses import dataclass

MANIFEST, FAILURE = "manifest.json", "failure.json"

MAX_NAME = 63
"""Of a label value; S3 would take more."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
_FRAME, _STAGE = re.compile(r"warm-start|iteration-(\d+)"), re.compile(r"[a-z-]+")
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class StagePlace:
    """What the place of a stage below a run says, such as iteration-1/score/shard-2-of-8."""

    stage: str
    """Its folder, which for most stages has their name."""
    iteration: int | None
    """From 1; 0 is the warm start, None the whole run."""
    shard: tuple[int, int] | None
    """Its number, from 0, and how many there are."""


def check_name(name: str, what: str) -> str:
    """Return the name if it can be part of an S3 key and of a Kubernetes label.

    Raises:
        ValueError: one line naming what was wrong.
    """
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be 1 to {MAX_NAME} lower-case letters, digits, '.', '_' or '-', and start and end with a "
            f"letter or a digit, got {name!r}"
        )
    return name


def check_count(number: int, what: str, minimum: int = 1) -> int:
    """Return the number if it is large enough.

    Raises:
        ValueError: one line naming what was wrong.
    """
    if number < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {number}")
    return number


def check_shard(shard: int, num_shards: int) -> int:
    """Return the number of a shard (from 0) if there are that many.

    Raises:
        ValueError: one line naming what was wrong.
    """
    if not 0 <= shard < check_count(num_shards, "num_shards"):
        raise ValueError(f"shard must be from 0 to {num_shards - 1}, got {shard}")
    return shard


def check_s3(uri: str, what: str) -> tuple[str, str]:
    """Return the bucket and the prefix of an address on S3.

    Raises:
        ValueError: one line naming what was wrong.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise ValueError(f"{what}: no address on S3, write s3://bucket/prefix, got {uri!r}")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(
            f"{what}: no bucket can be called {bucket!r}: a name has 3 to 63 lower-case letters, digits, dots, hyphens "
            f"and underscores, and begins and ends with a letter or digit; got {uri!r}"
        )
    return bucket, prefix


def join(uri: str, *parts: str) -> str:
    """Return a URI below another one."""
    return "/".join([uri.rstrip("/"), *parts])


def run(root: str, run_name: str) -> str:
    """Return where a run keeps everything it makes."""
    return join(root, "runs", check_name(run_name, "run"))


def run_of(uri: str) -> str:
    """Return the name of the run that an address belongs to; empty: to none."""
    name = uri.rpartition("/runs/")[2].partition("/")[0] if "/runs/" in uri else ""
    return name if len(name) <= MAX_NAME and _NAME.fullmatch(name) else ""


def run_uri_of(uri: str) -> str:
    """Return where the run is that an address belongs to; empty: it belongs to none."""
    name = run_of(uri)
    return f"{uri.rpartition('/runs/')[0]}/runs/{name}" if name else ""


def is_stage(place: str) -> bool:
    """Return whether an address below a run, such as iteration-1/train, is the place of a stage or of a shard."""
    return parse_place(place) is not None


def parse_place(place: str) -> StagePlace | None:
    """Return what an address below a run says; None: it is the place of no stage."""
    iteration, parts = iteration_of(place), place.split("/")
    parts = parts if iteration is None else parts[1:]
    shard = shard_of(parts[1]) if len(parts) == 2 else None
    parts = parts if shard is None else parts[:1]
    return StagePlace(parts[0], iteration, shard) if len(parts) == 1 and _STAGE.fullmatch(parts[0]) else None


def iteration_of(place: str) -> int | None:
    """Return the iteration of whatever lies below a run, 0 for the warm start; None: it belongs to the whole run."""
    frame = _FRAME.fullmatch(place.partition("/")[0])
    return int(frame[1] or 0) if frame else None


def shard_of(folder: str) -> tuple[int, int] | None:
    """Return the number of a shard, from 0, and how many there are, by the name of its folder; None: it is none."""
    match = _SHARD.fullmatch(folder)
    return (int(match[1]), int(match[2])) if match else None


def model(root: str, name: str) -> str:
    """Return where an imported model is kept; a hub id such as `org/model` becomes `org--model`."""
    return join(root, "models", check_name(name.lower().replace("/", "--"), "model name"))


def imported_model(root: str, source: str) -> str:
    """Return where a model source is kept; what a run below the root has made stays where it is.

    "org/name" of a hub gives the name; of a path or an address, the last folder and the name.
    """
    if source.startswith(join(root, "runs", "")):
        return source.rstrip("/")
    return model(root, "/".join(source.rstrip("/").split("/")[-2:]))


def promoted(root: str, name: str) -> str:
    """Return the pointer to the last promoted policy of a preset or schedule."""
    return join(root, "promoted", f"{check_name(name, 'name')}.json")


def promotion_history(pointer_uri: str) -> str:
    """Return where the entries of a promoted pointer are."""
    return f"{pointer_uri.removesuffix('.json')}.history"


def check_settings(run_uri: str) -> str:
    """Return where it is written what a run was last started with."""
    return join(run_uri, "check-settings")


def choose_inputs(run_uri: str) -> str:
    """Return where a recurring run says why it found nothing to work on."""
    return join(run_uri, "choose-inputs")


def import_for_run(run_uri: str, model_uri: str) -> str:
    """Return where a run says why a model that it needs could not be imported; the model itself is no run's own."""
    return join(run_uri, "import-model", model_uri.rstrip("/").rpartition("/")[2])


def data(run_uri: str) -> str:
    """Return where prepare-data writes."""
    return join(run_uri, "data")


def warm_start(run_uri: str, stage: str) -> str:
    """Return where a stage of the warm start (pair or train) writes."""
    return join(run_uri, "warm-start", stage)


def stage(run_uri: str, iteration: int, name: str) -> str:
    """Return where a stage of an iteration (from 1) writes."""
    return join(run_uri, f"iteration-{check_count(iteration, 'iteration')}", name)


def shard(run_uri: str, iteration: int, name: str, index: int, num_shards: int) -> str:
    """Return where one shard (from 0) of a stage of an iteration writes."""
    return join(stage(run_uri, iteration, name), f"shard-{check_shard(index, num_shards)}-of-{num_shards}")


def report(run_uri: str) -> str:
    """Return where the report of a run is written."""
    return join(run_uri, "report")
