"""A policy and what its evaluation says of it, read back: for whoever promotes it, describes it, or gives it away.

The evaluate stage has decided; nothing is decided here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, Metric, read_manifest, require_manifest

_STAGE = "evaluate"
_TRAINED = re.compile(r"(.*/(?:warm-start|iteration-\d+))/train/?")


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, as far as others go by it."""

    uri: str
    policy_digest: str
    """Content digest of the policy that it measured."""
    previous_uri: str
    """What that policy was trained from."""
    incumbent_digest: str | None
    """Of the policy that it was compared with: the promoted one, or the run's first. None: it does not say."""
    iteration: int
    verdict: Mapping[str, Metric]
    """All numbers, and the reason."""

    @property
    def is_accepted(self) -> bool:
        """Whether the policy broke no bound."""
        return bool(self.verdict.get("accepted"))

    @property
    def is_promotable(self) -> bool:
        """Whether the gate would promote the policy."""
        # Version 0.1 wrote whether it improved.
        return bool(self.verdict.get("promotable", self.is_accepted and self.verdict.get("improved")))

    @property
    def reason(self) -> str:
        """Why, in one line."""
        return str(self.verdict.get("reason", "?"))

    def require_of(self, policy_uri: str, manifest: Manifest) -> None:
        """Check that it is about a policy as it is now.

        Raises:
            UnfitError: it measured another one.
        """
        if self.policy_digest != manifest.content_digest:
            raise UnfitError(
                f"{policy_uri}: not the policy that was evaluated (content {manifest.content_digest[:12]}, {self.uri} "
                f"measured {self.policy_digest[:12] or '?'}): run `dice evaluate` on it, at another output"
            )


def require_model(uri: str) -> Manifest:
    """Return the manifest of a model.

    Raises:
        UnfitError: no finished model is there.
    """
    manifest = require_manifest(uri)
    if manifest.skipped:
        raise UnfitError(f"{uri}: holds no model: its stage was skipped ({manifest.skipped})")
    if not any(name.endswith(".safetensors") for name in manifest.files):
        raise UnfitError(f"{uri}: holds no model but the result of {manifest.stage}: give the place of a model")
    return manifest


def place_of_evaluation(policy_uri: str) -> str:
    """Return where a run keeps the evaluation of a policy that it has trained; empty: the address is no run's own."""
    match = _TRAINED.fullmatch(policy_uri)
    return f"{match[1]}/{_STAGE}" if match else ""


def read_evaluation(uri: str) -> Evaluated:
    """Return what an evaluation says.

    Raises:
        UnfitError: none is finished there.
    """
    return _parse(uri, require_manifest(uri, "`dice evaluate`"))


def find_evaluation(policy_uri: str) -> Evaluated | None:
    """Return the evaluation at its place beside a policy, or None where there is none or the stage was skipped."""
    place = place_of_evaluation(policy_uri)
    manifest = read_manifest(place) if place else None
    return None if manifest is None or manifest.skipped else _parse(place, manifest)


def _parse(uri: str, manifest: Manifest) -> Evaluated:
    if manifest.stage != _STAGE or manifest.skipped:
        found = f"that was skipped ({manifest.skipped})" if manifest.skipped else f"of {manifest.stage}"
        raise UnfitError(f"{uri}: holds a result {found}, where an evaluation is needed: give --evaluation")
    inputs = {name: value.rpartition("@") for name, value in manifest.inputs.items()}
    return Evaluated(
        uri,
        policy_digest=inputs["policy"][2] if "policy" in inputs else "",
        previous_uri=inputs["previous"][0] if "previous" in inputs else "",
        incumbent_digest=inputs["incumbent"][2] if "incumbent" in inputs else None,
        iteration=int(manifest.settings.get("iteration", 0)),
        verdict=manifest.metrics,
    )
