"""A run that has trained and measured policies, as far as its manifests tell: weights of a few bytes, no model."""

import json
import tempfile
from pathlib import Path
from typing import Any

from dice_core.storage import layout
from dice_core.storage.manifest import Manifest, publish_files

BETTER = {"accepted": 1, "promotable": 1, "outcome": "better", "win_rate": 0.58, "win_rate_low": 0.54}
BETTER |= {"win_rate_high": 0.62, "reason": "win rate 58.0% [54.0, 62.0]"}
NOT_SHOWN = BETTER | {
    "promotable": 0,
    "outcome": "not shown",
    "win_rate": 0.51,
    "reason": "win rate 51.0% [47.0, 55.0]",
}
REFUSED = NOT_SHOWN | {"accepted": 0, "outcome": "worse", "reason": "answers grew by 82.0%"}


def publish(uri: str, stage: str, files: dict[str, str] | None = None, **fields: Any) -> str:
    """Store a stage's result with files of these texts; return its address with its digest, as inputs are named."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in files or {}}
        for name, path in paths.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text((files or {})[name])
        manifest = publish_files(uri, paths, Manifest(stage=stage, fingerprint="", files={}, **fields))
    return f"{uri}@{manifest.content_digest}"


def digest_of(named: str) -> str:
    """Return the digest of a result, from its address with it."""
    return named.rpartition("@")[2]


class FinishedRun:
    """A run below a root: an imported model, data, and iterations."""

    def __init__(self, root: str, name: str = "march") -> None:
        """Store the model and the data."""
        self.root, self.uri = root, layout.run(root, name)
        settings = {"source": "org/zephyr-dpo", "revision": "", "commit": "0a1b2c"}
        self.policy = publish(layout.model(root, "org/zephyr-dpo"), "import-model", self.files(0), settings=settings)
        sources = {"preferences": "org/ultrafeedback:train_prefs", "prompts": "s3://bucket/prompts/2026-01.jsonl"}
        inputs = {"policy": self.policy}
        self.data = publish(
            layout.data(self.uri),
            "prepare-data",
            {"prompts.parquet.txt": "p"},
            settings={"sources": sources},
            inputs=inputs,
        )
        self.pointer = layout.promoted(root, "zephyr")

    @staticmethod
    def files(number: int) -> dict[str, str]:
        """Return the files of a model."""
        config = json.dumps({"model_type": "llama"})
        return {"config.json": config, "model.safetensors": f"weights {number}", "tokenizer.json": "{}"}

    def iterate(self, number: int, verdict: dict[str, Any] | None = None, *, incumbent: str = "") -> str:
        """Train a policy from the last one and evaluate it unless there is no verdict; return the policy's address."""
        before, place = self.policy, layout.stage(self.uri, number, "train")
        pairs = publish(
            layout.stage(self.uri, number, "pair"),
            "pair",
            {"pairs": str(number)},
            inputs={"data": self.data, "policy": before},
        )
        files = {**self.files(number), "metrics.jsonl": "{}"}
        settings = {"training": {"beta": 0.1, "max_steps": 300}, "seed": 42, "iteration": number}
        inputs = {"policy": before, "pairs": pairs}
        self.policy = publish(place, "train", files, settings=settings, inputs=inputs, ran_by={"runner": "torchrun"})
        if verdict is not None:
            inputs = {"policy": self.policy, "previous": before} | ({"incumbent": incumbent} if incumbent else {})
            evaluate = layout.stage(self.uri, number, "evaluate")
            settings = {"iteration": number}
            publish(evaluate, "evaluate", {"evaluation.json": "{}"}, metrics=verdict, settings=settings, inputs=inputs)
        return place
