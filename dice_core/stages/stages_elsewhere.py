"""Results of single stages, wherever they lie, put in the order of a run, so that a report can show them.

A manifest says what a result is and what it was made from: from that follow its iteration and its shard.
"""

from collections.abc import Sequence

from dice_core.stages.place import Place
from dice_core.stages.table import GENERATE, IMPORT_MODEL, IMPORT_RESPONSES, REPORT, STAGES, Stage
from dice_core.storage import layout
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, require_manifest
from dice_core.storage.run_contents import RunContents

_TITLE = "single stages"
"""In the place of a run's address; the page has its end as the run's name."""
_NOT_SHOWN = (IMPORT_MODEL, REPORT)


def gathered(uris: Sequence[str]) -> RunContents:
    """Return results as a run that holds them.

    Args:
        uris: of finished stages, in any order; shards of one stage in theirs.

    Raises:
        StorageError: nothing finished is at one of them, it is nothing that a report shows, or two of them are the
            same stage of the same iteration.
    """
    manifests = {uri.rstrip("/"): require_manifest(uri.rstrip("/")) for uri in uris}
    stages = {uri: _stage(uri, manifest) for uri, manifest in manifests.items()}
    iterations = {uri: _iteration(uri, manifests, frozenset()) for uri in manifests}
    addresses: dict[str, str] = {}
    for uri, stage in stages.items():
        alike = [other for other in manifests if (stages[other], iterations[other]) == (stage, iterations[uri])]
        place = Place(stage.name)
        if stage.scope != "run":
            shard = {"shard": alike.index(uri), "num_shards": len(alike)} if stage.scope == "shard" else {}
            place = Place(stage.name, iterations[uri], **shard)
        if place.below in addresses:
            raise UnfitError(
                f"{uri}: the {place.label} lies at {addresses[place.below]} already: give one address for each stage "
                "of an iteration"
            )
        addresses[place.below] = uri
    return RunContents(
        uri=_TITLE,
        keys=tuple(f"{place}/{layout.MANIFEST}" for place in addresses),
        manifests={place: manifests[uri] for place, uri in addresses.items()},
        addresses=addresses,
    )


def _stage(uri: str, manifest: Manifest) -> Stage:
    stage = STAGES.get(manifest.stage)
    if stage is None or stage in _NOT_SHOWN:
        raise UnfitError(f"{uri}: holds the result of {manifest.stage}, which a report does not show: leave it out")
    # A user's own responses take the place of the generated ones.
    return GENERATE if stage is IMPORT_RESPONSES else stage


def _iteration(uri: str, manifests: dict[str, Manifest], passed: frozenset[str]) -> int:
    """Return the iteration of a result: as it says, or as what it was made from and what was made from it say."""
    told = manifests[uri].settings.get("iteration")
    if isinstance(told, int):
        return told
    made_from = _inputs(manifests[uri])
    near = [other for other in manifests if other in made_from or uri in _inputs(manifests[other])]
    near = [other for other in near if other not in passed and manifests[other].stage != "prepare-data"]
    return next((_iteration(other, manifests, passed | {uri}) for other in near), 1)


def _inputs(manifest: Manifest) -> set[str]:
    return {value.rpartition("@")[0].rstrip("/") for value in manifest.inputs.values()}
