"""Checkpoints: how long training stands still for them, ours and files written by the training process itself.

Weights and the two moments of AdamW in float32, as after a step of a real training, saved three times at the same
points. Between two saves each way has the time to end what it does meanwhile: what is compared is the standing still.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Comparison, Stopwatch, Timed, Values, stopwatch
from tests.benchmarks.work import Work

_NUM_SAVES = 3
_NUM_PARAMETERS = {"smoke": 10**6, "full": 135 * 10**6}
_NUM_TENSORS = 200


def _training(folder: Path) -> tuple[Any, Any]:
    """Return weights by name and their optimizer, which has made a step."""
    import torch

    size = _NUM_PARAMETERS[Work(folder).size.name] // _NUM_TENSORS
    torch.manual_seed(0)
    weights = {f"layer-{number}": torch.nn.Parameter(torch.randn(size)) for number in range(_NUM_TENSORS)}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3)
    for weight in weights.values():
        weight.grad = torch.randn(size)
    optimizer.step()
    return weights, optimizer


@contextmanager
def _places(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield where checkpoints are written and where they are stored."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield Path(place) / "machine", Path(place) / "stored"


def ours(folder: Path) -> Timed:
    """Stage weights and optimizer in memory; another process writes and stores them."""
    from dice_core.training.checkpoint_files import CheckpointOwner
    from dice_core.training.checkpoints import CheckpointStore
    from dice_core.training.copies import Copies
    from dice_core.training.staging import load_state

    weights, optimizer = _training(folder)
    watches = []
    with _places(folder) as (machine, stored):
        owner = CheckpointOwner("benchmark", num_processes=1, num_nodes=1, deepspeed="none")
        store = CheckpointStore(str(stored), machine, owner, Copies(folder / "copies.lock"))
        for step in range(1, _NUM_SAVES + 1):
            place = machine / f"checkpoint-{step}"
            with stopwatch() as watch:
                place.mkdir(parents=True)
                store.stage_tensors(weights, place / "policy.safetensors")
                store.stage_state(optimizer.state_dict(), place / "optimizer.pt")
                store.save(step)
            watches.append(watch)
            store.wait()
        store.close()
        return _timed(watches, place / "policy.safetensors", load_state(place / "optimizer.pt"))


def written_by_training(folder: Path) -> Timed:
    """Write the same as transformers' Trainer does, and store it in a thread once it is written."""
    from concurrent.futures import ThreadPoolExecutor

    import torch
    from safetensors.torch import save_file

    from dice_core.storage.manifest import Manifest, publish_files

    weights, optimizer = _training(folder)
    watches = []
    with _places(folder) as (machine, stored), ThreadPoolExecutor(1) as pool:
        for step in range(1, _NUM_SAVES + 1):
            place = machine / f"checkpoint-{step}"
            with stopwatch() as watch:
                place.mkdir(parents=True)
                save_file({name: weight.data for name, weight in weights.items()}, place / "policy.safetensors")
                torch.save(optimizer.state_dict(), place / "optimizer.pt")
            watches.append(watch)
            files = {path.name: path for path in place.iterdir()}
            manifest = Manifest(stage="checkpoint", fingerprint="", files={})
            pool.submit(publish_files, f"{stored}/{step}", files, manifest).result()
        state = torch.load(place / "optimizer.pt", weights_only=True)
        return _timed(watches, place / "policy.safetensors", state)


def _timed(watches: Sequence[Stopwatch], weights: Path, state: Any) -> Timed:
    """Return the seconds of all saves, and sums that tell whether the last checkpoint holds the same."""
    from safetensors.torch import load_file

    sums = {name: float(value.double().sum()) for name, value in load_file(weights).items()}
    moments = [float(entry["exp_avg_sq"].double().sum()) for entry in state["state"].values()]
    return Timed(sum(watch.seconds for watch in watches), {"weights": sums, "moments": moments})


def same_checkpoint(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether weights or moments differ."""
    return "" if list(ours) == list(peer) else "another checkpoint"


COMPARISONS = [
    Comparison(
        "checkpoint",
        "the training process writes its files, as transformers' Trainer does; the time that training stands still",
        ours=("checkpoint:ours",),
        peer=("checkpoint:written_by_training",),
        clock="part",
        check=same_checkpoint,
    )
]
