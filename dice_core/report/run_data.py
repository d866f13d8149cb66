"""What a report shows, as plain values, and the reader that brings it together from a run's manifests and tables.

A run may be unfinished or stopped by its gate: what is not there is shown as such, and nothing here raises for it.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from dice_core import __version__
from dice_core.data import records
from dice_core.preferences.reward import implicit_reward
from dice_core.storage import layout
from dice_core.storage.contract import StorageError
from dice_core.storage.failures import StageFailure
from dice_core.storage.manifest import Manifest, Metric, fetch_files
from dice_core.storage.promotion import read_promotion
from dice_core.storage.run_contents import RunContents

State = Literal["completed", "skipped", "partial", "missing"]
_BATCH_ROWS = 4096
_OF = ("reward", "implicit_reward")
"""What score says the mean and the standard deviation of, over num_scored responses."""
_PAIR_COLUMNS = ["source", "chosen", "rejected", "chosen_reward", "rejected_reward"]

Details = Literal["none", "small", "all"]


@dataclass(frozen=True)
class ReportedStage:
    """A stage of an iteration, as the report looks for it."""

    name: str
    in_warm_start: bool = False
    group: str = ""
    """What the pair stage calls the shards of this one among its inputs; empty: it has no shards."""


@dataclass(frozen=True)
class StageData:
    """What is known of a stage of an iteration, all its shards together.

    `partial` is a stage of which some shards have ended; `missing` one that has not, or was never started.
    """

    state: State = "missing"
    metrics: dict[str, Metric] = field(default_factory=dict)
    """Counts are sums over the shards, seconds are those of the slowest, means and deviations are of all rows; the rest
    is the first shard's."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """By URI."""
    num_shards: int = 1
    skipped: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The stage's settings by section; the same in all shards."""
        return next((manifest.settings for manifest in self.manifests.values()), {})


@dataclass(frozen=True)
class Histogram:
    """Counts of several groups of values over the same bins. Values beyond the edges are in the outermost bins."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]

    def shares(self, group: str) -> list[float]:
        """Return the share of a group's values in each bin, in percent."""
        total = sum(self.counts[group]) or 1
        return [100 * count / total for count in self.counts[group]]


Histograms = Mapping[str, Histogram]
"""Those of an iteration: rewards, lengths."""


@dataclass(frozen=True)
class IterationData:
    """One iteration (from 1), or the warm start (0)."""

    number: int
    stages: dict[str, StageData] = field(default_factory=dict)
    rewards: Histogram | None = None
    """Implicit rewards without beta, nats, of the groups all, chosen, rejected."""
    lengths: Histogram | None = None
    """Characters, of the same groups."""
    gap_curve: tuple[tuple[float, float], ...] = ()
    """(length penalty, mean length gap) points, ascending."""
    training: tuple[dict[str, Any], ...] = ()
    """Lines of metrics.jsonl."""
    evaluation: dict[str, Any] | None = None
    """evaluation.json."""
    alpaca_eval: dict[str, Metric] = field(default_factory=dict)
    """Numbers of `dice alpaca-scores` on its policy; empty: there are none."""
    failures: tuple[StageFailure, ...] = ()
    """Why its stages have failed whose last attempt left a reason."""

    def stage(self, name: str) -> StageData:
        """Return a stage, as missing where nothing is known of it."""
        return self.stages.get(name, StageData())


@dataclass(frozen=True)
class RunData:
    """Everything a report shows."""

    uri: str
    iterations: tuple[IterationData, ...]
    data: StageData = StageData()
    """prepare-data."""
    written: str = ""
    """When this was read, UTC."""
    notes: tuple[str, ...] = ()
    """What could not be read, and why."""
    failures: tuple[StageFailure, ...] = ()
    """Of the stages that belong to no iteration, such as prepare-data."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """What the run was last started with, as check-settings recorded it; empty where stages were run one by one."""
    promoted: Mapping[str, str] = field(default_factory=dict)
    """Pointers that the run may move, and the address of the policy that each names now; empty: none yet."""
    package_version: str = __version__

    @property
    def histograms(self) -> dict[str, Histograms]:
        """The histograms of all iterations, by `made_from` of their stages."""
        return {
            made_from(one.stages): {"rewards": one.rewards, "lengths": one.lengths}
            for one in self.iterations
            if one.rewards and one.lengths
        }

    @property
    def is_empty(self) -> bool:
        """Whether no stage of the run has finished or said why it failed."""
        stages = [self.data, *(stage for one in self.iterations for stage in one.stages.values())]
        failures = [*self.failures, *(failure for one in self.iterations for failure in one.failures)]
        return not failures and all(stage.state == "missing" for stage in stages)


def collect(
    run: RunContents,
    num_iterations: int,
    stages: Sequence[ReportedStage],
    *,
    details: Details = "all",
    known: Mapping[str, Histograms] = MappingProxyType({}),
) -> RunData:
    """Return what a run has made so far.

    Args:
        run: what it has left.
        num_iterations: planned; those that have not begun are there as missing.
        stages: of an iteration, in the order of the page.
        details: read beside the manifests. Small are curves and samples; all are histograms too, for which large tables
            are read.
        known: histograms that were made before, by `made_from` of the stages.
    """
    notes: list[str] = []
    iterations: list[IterationData] = []
    for number in range(num_iterations + 1):
        found = _iteration(run, number, stages) if number else _warm_start(run, stages)
        failures = tuple(failure for failure in run.failures if failure.iteration == number)
        if not failures and all(stage.state == "missing" for stage in found.values()):
            if number == 0:
                continue
            reason = _why_none_follows(iterations[-1]) if iterations else ""
            found = {name: StageData("skipped", skipped=reason) for name in found} if reason else found
        more = _details(found, notes, details, known.get(made_from(found), {}))
        more["alpaca_eval"] = _alpaca_eval(run, number)
        iterations.append(IterationData(number, found, **more, failures=failures))
    planned = run.manifest(layout.check_settings(run.uri))
    return RunData(
        run.uri,
        tuple(iterations),
        _one(run, layout.data(run.uri)),
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        tuple(notes),
        tuple(failure for failure in run.failures if failure.iteration is None),
        planned.settings if planned else {},
        _promoted(iterations, notes) if details != "none" else {},
    )


def _alpaca_eval(run: RunContents, number: int) -> dict[str, Metric]:
    """Return what the run keeps of AlpacaEval beside an iteration's other results."""
    name = "alpaca-scores"
    found = run.manifest(layout.stage(run.uri, number, name) if number else layout.warm_start(run.uri, name))
    return found.metrics if found else {}


def _promoted(iterations: Sequence[IterationData], notes: list[str]) -> dict[str, str]:
    """Return what the pointers name that the evaluations were to move."""
    found: dict[str, str] = {}
    for iteration in iterations:
        uri = str(iteration.stage("evaluate").settings.get("promoted_uri") or "")
        if not uri or uri in found:
            continue
        try:
            promotion = read_promotion(uri)
        except StorageError as error:
            notes.append(" ".join(str(error).split()))
        else:
            found[uri] = promotion.policy_uri if promotion else ""
    return found


def _why_none_follows(iteration: IterationData) -> str:
    """Return why the next iteration has left nothing, where the gate is the reason: a cluster starts none of it."""
    evaluate = iteration.stage("evaluate")
    if evaluate.state != "completed" or evaluate.metrics.get("accepted"):
        return evaluate.skipped
    return f"the policy was refused by {next(iter(evaluate.manifests))}: {evaluate.metrics.get('reason')}"


def histogram(groups: Mapping[str, ArrayLike]) -> Histogram | None:
    """Bin several groups of numbers together, or return None where there is no finite number.

    The bins span all but the outermost half percent on each side, so that a single outlier does not squeeze the rest.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
    arrays = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    everything = np.concatenate(list(arrays.values())) if arrays else np.empty(0)
    if not everything.size:
        return None
    low, high = np.quantile(everything, [0.005, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    num_bins = int(np.clip(2 * np.cbrt(everything.size), 10, 40))
    edges = np.linspace(low, high, num_bins + 1)
    counts = {
        name: tuple(int(n) for n in np.histogram(np.clip(values, low, high), edges)[0])
        for name, values in arrays.items()
    }
    return Histogram(tuple(float(edge) for edge in edges), counts)


def merge_shards(manifests: Mapping[str, Manifest], num_shards: int) -> StageData:
    """Return a stage from the manifests of its finished shards."""
    found = list(manifests.values())
    if not found:
        return StageData(num_shards=num_shards)
    metrics: dict[str, Metric] = {}
    for manifest in found:
        for name, value in manifest.metrics.items():
            old = metrics.get(name)
            if isinstance(value, str) or isinstance(old, str) or old is None:
                metrics.setdefault(name, value)
            elif name.startswith("num_"):
                metrics[name] = old + value
            elif name == "seconds":
                metrics[name] = max(old, value)
    metrics |= _pooled([manifest.metrics for manifest in found])
    skipped = next((manifest.skipped for manifest in found if manifest.skipped), "")
    state: State = "skipped" if skipped else "completed" if len(found) == num_shards else "partial"
    return StageData(state, metrics, dict(manifests), num_shards, skipped)


def _pooled(shards: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Return the means, and the deviations of rewards, of all shards' rows together."""
    pooled: dict[str, Metric] = {}
    for name, count in (("reward_agreement", "num_agreement_prompts"), *((f"{of}_mean", "num_scored") for of in _OF)):
        known = [(float(shard[count]), float(shard[name])) for shard in shards if shard.get(count) and name in shard]
        if known:
            pooled[name] = sum(number * mean for number, mean in known) / sum(number for number, _ in known)
    for of in _OF:
        names = ("num_scored", f"{of}_mean", f"{of}_std")
        known_in = [shard for shard in shards if shard.get("num_scored") and all(name in shard for name in names)]
        rows = [tuple(float(shard[name]) for name in names) for shard in known_in]
        if rows:
            squares = sum(number * (mean**2 + std**2) for number, mean, std in rows) / sum(row[0] for row in rows)
            pooled[f"{of}_std"] = max(squares - float(pooled[f"{of}_mean"]) ** 2, 0.0) ** 0.5
    return pooled


def _one(run: RunContents, uri: str) -> StageData:
    manifest = run.manifest(uri)
    return merge_shards({run.address(uri): manifest} if manifest else {}, 1)


def _warm_start(run: RunContents, stages: Sequence[ReportedStage]) -> dict[str, StageData]:
    return {stage.name: _one(run, layout.warm_start(run.uri, stage.name)) for stage in stages if stage.in_warm_start}


def _iteration(run: RunContents, number: int, stages: Sequence[ReportedStage]) -> dict[str, StageData]:
    pair = run.manifest(layout.stage(run.uri, number, "pair"))
    return {stage.name: _stage(run, layout.stage(run.uri, number, stage.name), stage.group, pair) for stage in stages}


def _stage(run: RunContents, uri: str, group: str, pair: Manifest | None) -> StageData:
    if not group:
        return _one(run, uri)
    # The pair stage says exactly which shards it read; before it has ended, what lies there has to do.
    used = [value.rpartition("@")[0] for key, value in (pair.inputs if pair else {}).items() if _is_in(key, group)]
    uris = used or _shard_uris(run, uri)
    found = {run.address(uri): manifest for uri in uris if (manifest := run.manifest(uri))}
    return merge_shards(found, max(len(uris), 1))


def _is_in(name: str, group: str) -> bool:
    return name.startswith(f"{group}/")


def _shard_uris(run: RunContents, stage_uri: str) -> list[str]:
    """Return the places of all shards of a stage, those that have not begun too."""
    shards = [layout.shard_of(folder) for folder in (key.partition("/")[0] for key in run.keys_below(stage_uri))]
    counts = [shard[1] for shard in shards if shard]
    if not counts:
        return []
    # Shards of another number of them are an attempt that was given up.
    num_shards = max(set(counts), key=counts.count)
    return [layout.join(stage_uri, f"shard-{i}-of-{num_shards}") for i in range(num_shards)]


def _details(stages: Mapping[str, StageData], notes: list[str], details: Details, known: Histograms) -> dict[str, Any]:
    found: dict[str, Any] = dict(known)
    readers = [_read_histograms] if details == "all" and not known else []
    readers += [_read_gap_curve, _read_training, _read_evaluation] if details != "none" else []
    with tempfile.TemporaryDirectory(prefix="dice-report-") as folder:
        for i, reader in enumerate(readers):
            try:
                found |= reader(stages, Path(folder) / str(i))
            except (StorageError, records.RecordError, ValueError, KeyError) as error:
                # A page that says what is missing serves better than none.
                notes.append(" ".join(str(error).split()))
    return found


def made_from(stages: Mapping[str, StageData]) -> str:
    """Return what identifies the tables that histograms are made from."""
    read = (stages[name].manifests.values() for name in ("score", "pair") if name in stages)
    digests = [manifest.content_digest for manifests in read for manifest in manifests]
    return sha256("\n".join(digests).encode()).hexdigest()


def _read_histograms(stages: Mapping[str, StageData], folder: Path) -> dict[str, Any]:
    rewards: dict[str, list[Any]] = {"all": [], "chosen": [], "rejected": []}
    lengths: dict[str, list[Any]] = {"all": [], "chosen": [], "rejected": []}
    for path in _tables(stages.get("score"), folder, "part-"):
        scores = records.read_table(path, records.SCORES, ["policy_logps", "reference_logps", "num_chars", "reward"])
        implicit = implicit_reward(scores["policy_logps"], scores["reference_logps"])
        # Those of the pairs are what ranked the responses.
        rewards["all"].append(implicit if scores["reward"].null_count else np.asarray(scores["reward"]))
        lengths["all"].append(np.asarray(scores["num_chars"]))
    if not rewards["all"]:
        return {}
    for path in _tables(stages.get("pair"), folder, "pairs"):
        for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=_PAIR_COLUMNS):
            generated = batch.filter(pc.equal(batch["source"], "generated"))
            for side in ("chosen", "rejected"):
                rewards[side].append(np.asarray(generated[f"{side}_reward"], dtype=np.float64))
                lengths[side].append(np.asarray(pc.utf8_length(generated[side])))
    joined = [{name: _concatenate(parts) for name, parts in values.items()} for values in (rewards, lengths)]
    return {"rewards": histogram(joined[0]), "lengths": histogram(joined[1])}


def _concatenate(parts: Sequence[Any]) -> Any:
    return np.concatenate(parts) if parts else np.empty(0)


def _read_gap_curve(stages: Mapping[str, StageData], folder: Path) -> dict[str, Any]:
    curve = next((json.loads(path.read_text()) for path in _files(stages.get("pair"), folder, "length_penalty")), None)
    if curve is None:
        return {}
    return {"gap_curve": tuple(zip(curve["length_penalties"], curve["length_gaps"], strict=True))}


def _read_training(stages: Mapping[str, StageData], folder: Path) -> dict[str, Any]:
    lines = [path.read_text().splitlines() for path in _files(stages.get("train"), folder, "metrics.jsonl")]
    return {"training": tuple(json.loads(line) for file in lines for line in file if line.strip())}


def _read_evaluation(stages: Mapping[str, StageData], folder: Path) -> dict[str, Any]:
    files = _files(stages.get("evaluate"), folder, "evaluation")
    found = next((json.loads(path.read_text()) for path in files), None)
    if found is not None and "outcome" not in found.get("gate", {}):
        where = next(iter(stages["evaluate"].manifests))
        raise ValueError(f"{where}: measured by an earlier version: its gate and its answers are not shown")
    return {"evaluation": found}


def _tables(stage: StageData | None, folder: Path, prefix: str) -> Iterator[Path]:
    return (path for path in _files(stage, folder, prefix) if path.suffix == ".parquet")


def _files(stage: StageData | None, folder: Path, prefix: str) -> Iterator[Path]:
    """Fetch the files of a stage whose names begin so, one at a time; each is gone when the next one comes."""
    for uri, manifest in stage.manifests.items() if stage else ():
        for name in sorted(name for name in manifest.files if name.startswith(prefix)):
            path = fetch_files(uri, manifest, folder, [name])[name]
            yield path
            path.unlink()
