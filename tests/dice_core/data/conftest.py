"""A data set on the Hub, without a network: `datasets` reads a folder through the same call, so its own loader runs."""

from pathlib import Path

import pytest


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Return an empty data set that `load_dataset` finds as org/pairs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "org" / "pairs"
    folder.mkdir(parents=True)
    original = __import__("datasets").load_dataset
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda name, *args, revision=None, **kwargs: original(
            str(folder) if name == "org/pairs" else name, *args, revision=revision, **kwargs
        ),
    )
    return folder
