"""What tests of training share: one thread, a tiny policy, and pairs of random tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dice_core.models.importing import import_model
from tests.dice_core.training.pair_rows import make_rows, write_rows


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Keep tiny matrices on one core: with more, threads mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def policy_uri(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("policy"))
    import_model(str(tiny_model), uri)
    return uri


@pytest.fixture(scope="module")
def pairs_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(make_rows(num_eval=3), tmp_path_factory.mktemp("pairs") / "pairs.parquet")
