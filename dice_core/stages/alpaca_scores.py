"""Stage alpaca-scores: AlpacaEval's annotator judges the answers of alpaca-eval, or has; no stage of a pipeline.

evaluation/annotator.py runs the package. The verdicts that it has paid for are kept on this machine until the scores
are stored, so that one that was killed goes on.
"""

import json
import os
from functools import partial
from hashlib import sha256
from pathlib import Path

from dice_core.evaluation.annotator import annotate, find_program
from dice_core.settings.base import ConfigError
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.prepare_data import LocalSource, local_sources
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import ALPACA_SCORES
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest

_SCORES, _OUTPUTS = "scores.json", "model_outputs.json"
_LEADERBOARD, _ANNOTATIONS = "leaderboard.csv", "annotations.json"


@leaves_reason(ALPACA_SCORES)
def alpaca_scores(
    answers_uri: str,
    output_uri: str,
    *,
    annotator: str = "",
    results_source: str = "",
    prompts_source: str = "",
    overwrite: bool = False,
) -> StageReport:
    """Read win rate and length-controlled win rate from AlpacaEval: run its annotator, or take what it has written.

    Args:
        answers_uri: output of alpaca-eval.
        output_uri: where scores.json goes, such as ROOT/runs/NAME/iteration-2/alpaca-scores.
        annotator: run this one, such as weighted_alpaca_eval_gpt4_turbo, with the program that DICE_ALPACA_EVAL names;
            the keys that it needs are in the environment, as OPENAI_API_KEY.
        results_source: folder or address where alpaca_eval has written leaderboard.csv and annotations.json of these
            answers.
        prompts_source: with an annotator, the JSON file of the package with the outputs of the baseline.
        overwrite: first delete what this stage left at its output.
    """
    require_judge(annotator, results_source)
    if annotator and not prompts_source:
        raise ConfigError("prompts_source: is empty, name AlpacaEval's JSON file of its baseline's outputs")
    results = _digest_of(results_source) if results_source else ""
    with local_sources({"prompts": prompts_source}) as sources:
        work = partial(_score, annotator=annotator, results_source=results_source, baseline=sources.get("prompts"))
        return run_stage(
            ALPACA_SCORES,
            output_uri,
            work,
            settings={},
            arguments={"annotator": annotator, "results": results},
            inputs={"answers": answers_uri},
            overwrite=overwrite,
        )


def require_judge(annotator: str, results_source: str) -> None:
    """Check that somebody judges, before anything is sampled.

    Raises:
        ConfigError: nobody or two do, or there is no program.
    """
    if bool(annotator) == bool(results_source):
        raise ConfigError(
            "annotator, results_source: give one of the two: who judges, or where alpaca_eval has written"
        )
    if annotator:
        find_program()


def _result_keys(source: str) -> dict[str, str]:
    """Return where in a folder the two files are, by name; alpaca_eval puts them into a folder of the annotator's.

    Raises:
        UnfitError: they are not there, or twice.
    """
    keys = [found.key for found in open_storage(source).list()]
    folders = [key.rpartition("/")[0] for key in keys if key.rpartition("/")[2] == _LEADERBOARD]
    if len(folders) != 1:
        raise UnfitError(
            f"{source}: has {len(folders) or 'no'} {_LEADERBOARD} of AlpacaEval, where one is needed: give the folder "
            "that alpaca_eval wrote them to"
        )
    found = {name: f"{folders[0]}/{name}".lstrip("/") for name in (_LEADERBOARD, _ANNOTATIONS)}
    if found[_ANNOTATIONS] not in keys:
        raise UnfitError(f"{source}: has no {found[_ANNOTATIONS]} beside the leaderboard: alpaca_eval writes both")
    return found


def _digest_of(source: str) -> str:
    storage = open_storage(source)
    return sha256(b"\n".join(storage.read_bytes(key) for key in _result_keys(source).values())).hexdigest()


def _score(context: StageContext, *, annotator: str, results_source: str, baseline: LocalSource | None) -> Manifest:
    """Have the answers judged, and store what follows."""
    from dice_core.evaluation.alpaca import read_annotations, read_leaderboard, score

    answers = context.inputs["answers"]
    path = answers.fetch(context.folder / "answers", [_OUTPUTS])[_OUTPUTS]
    outputs = json.loads(path.read_text())
    kept = _kept(context.fingerprint)
    if annotator:
        results_source = str(context.folder / "results")
        _annotate(path, annotator, Path(results_source), baseline, answers.manifest, kept)
    storage, files = open_storage(results_source), {}
    for name, key in _result_keys(results_source).items():
        files[name] = context.folder / name
        storage.download(key, files[name])
    named = layout.join(results_source, _LEADERBOARD)
    leaderboard = read_leaderboard(files[_LEADERBOARD], outputs[0]["generator"], named)
    annotations = read_annotations(files[_ANNOTATIONS], layout.join(results_source, _ANNOTATIONS))
    scores = score(leaderboard, annotations, outputs, results_source)
    # Without a text of AlpacaEval's: what becomes of its data is for the user to decide.
    preferences = [found.preference for found in annotations]
    stored = context.write_json({**scores, "preferences": preferences}, _SCORES)
    manifest = context.publish({_SCORES: stored}, {**scores, "seconds": context.seconds()})
    kept.unlink(missing_ok=True)
    return manifest


def _kept(fingerprint: str) -> Path:
    """Return where an annotator keeps the verdicts that it has paid for, until the scores are stored."""
    cache = Path(os.environ.get("DICE_CACHE") or "~/.cache/dice/models").expanduser()
    return cache / "alpaca-eval" / f"{fingerprint}.json"


def _annotate(
    path: Path, annotator: str, folder: Path, baseline: LocalSource | None, answers: Manifest, kept: Path
) -> None:
    """Have alpaca_eval compare the answers with the baseline's outputs."""
    from dice_core.evaluation.alpaca import read_prompts

    assert baseline is not None
    if baseline.digest != answers.settings.get("prompts"):
        raise UnfitError(f"{baseline.shown}: not the file whose prompts were answered: give that one")
    if not all(prompt.baseline_output for prompt in read_prompts(Path(baseline.path), baseline.shown)):
        raise UnfitError(f"{baseline.shown}: has no outputs of a baseline to compare with: give the file that has them")
    annotate(path, Path(baseline.path), annotator, folder, kept)
