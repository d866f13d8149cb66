"""Weights moved further along a step of training: policy + alpha * (policy - previous).

ExPO ("Model Extrapolation Expedites Alignment", arXiv 2404.16792, code/extrapolate.py): DPO's steps are small, and to
go on in their direction often helps, at no cost. Its authors find 0.3 to 0.5 usually good. They add in bfloat16; here
it is float32, rounded once.

Reads safetensors files piece by piece: of two models of any size a few megabytes are in memory. Loads no torch.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dice_core.models.files import ModelError, TensorHeader, shard_names, tensor_headers

Floats = NDArray[np.float32]

_PIECE_VALUES = 1 << 20

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Of a value, for the dtypes of weights by safetensors' own names."""
_COPIED = ("I", "U", "BOOL")
"""How the names of other dtypes begin that a model may have: whole numbers, which no training moves."""


@dataclass
class StepSizes:
    """What an extrapolation did, as sums of squares over all weights."""

    weights: float = 0.0
    step: float = 0.0
    lost: float = 0.0

    @property
    def relative_update(self) -> float:
        """Norm of what was added over the norm of the policy's weights."""
        return (self.step / self.weights) ** 0.5 if self.weights else 0.0

    @property
    def rounding_loss(self) -> float:
        """Norm of what rounding to the policy's dtype moves, over the norm of what was added."""
        return (self.lost / self.step) ** 0.5 if self.step else 0.0


@dataclass(frozen=True)
class _Tensor:
    """Where the values of a tensor are."""

    path: Path
    start: int
    num_bytes: int
    header: TensorHeader


@dataclass(frozen=True)
class _Shard:
    """A safetensors file: its first bytes, and its tensors in the order of their values."""

    path: Path
    head: bytes
    tensors: dict[str, _Tensor] = field(default_factory=dict)


def extrapolate(
    policy: Path,
    previous: Path,
    output: Path,
    alpha: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> StepSizes:
    """Write weights that lie further along the way from the previous model to the policy.

    The files are those of the policy: the same names, tensors and dtypes.

    Args:
        policy: folder of a model.
        previous: folder of the model that the policy was trained from; its weights may be cut into other files and
            have another dtype.
        output: folder that gets the weights; not the files beside them.
        alpha: how much further, in steps: 0 is the policy, 1 as far again as training went.
        on_progress: called with (bytes done, all bytes).

    Raises:
        ModelError: the two are not one architecture, or a value is no finite number.
    """
    shards = [_read_shard(policy / name) for name in shard_names(policy)]
    others = {name: tensor for shard in shard_names(previous) for name, tensor in _tensors(previous / shard)}
    tensors = [(name, tensor) for shard in shards for name, tensor in shard.tensors.items()]
    for name, tensor in tensors:
        _check_alike(name, tensor, others.get(name), previous)
    sizes, num_all, num_done = StepSizes(), sum(shard.path.stat().st_size for shard in shards), 0
    output.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        with (output / shard.path.name).open("wb") as stream:
            stream.write(shard.head)
            for name, tensor in shard.tensors.items():
                for piece in _moved(name, tensor, others[name], alpha, sizes):
                    stream.write(piece)
                    num_done += len(piece)
                    if on_progress:
                        on_progress(num_done, num_all)
    return sizes


def _read_shard(path: Path) -> _Shard:
    with path.open("rb") as stream:
        size = stream.read(8)
        head = size + stream.read(int.from_bytes(size, "little"))
    return _Shard(path, head, dict(_tensors(path)))


def _tensors(path: Path) -> list[tuple[str, _Tensor]]:
    """Return the tensors of a file in the order of their values, which lie one after another without gaps."""
    headers = tensor_headers(path)  # refuses a file that is not whole
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries: dict[str, Any] = json.loads(stream.read(length))
    found = []
    for name, header in headers.items():
        start, end = entries[name]["data_offsets"]
        found.append((name, _Tensor(path, 8 + length + start, end - start, header)))
    return sorted(found, key=lambda entry: entry[1].start)


def _check_alike(name: str, tensor: _Tensor, other: _Tensor | None, previous: Path) -> None:
    if other is None:
        raise ModelError(f"{previous}: lacks tensor {name!r}, which the policy has: give the model it was trained from")
    if other.header.shape != tensor.header.shape:
        raise ModelError(
            f"{previous}: tensor {name!r} has shape {other.header.shape}, that of the policy {tensor.header.shape}: "
            "give the model it was trained from"
        )
    kinds = {entry.header.dtype for entry in (tensor, other)}
    if not (kinds <= _BYTES.keys() or (len(kinds) == 1 and tensor.header.dtype.startswith(_COPIED))):
        raise ModelError(
            f"{previous}: tensor {name!r} is of {other.header.dtype}, that of the policy of {tensor.header.dtype}: "
            f"both must be of one of {', '.join(_BYTES)}"
        )


def _moved(name: str, tensor: _Tensor, other: _Tensor, alpha: float, sizes: StepSizes) -> Iterator[bytes]:
    """Yield the new values of a tensor as bytes, piece by piece, and add up what they do."""
    dtype = tensor.header.dtype
    num_values = int(np.prod(tensor.header.shape, dtype=np.int64))
    with tensor.path.open("rb") as ours, other.path.open("rb") as theirs:
        ours.seek(tensor.start)
        theirs.seek(other.start)
        if dtype not in _BYTES:
            yield ours.read(tensor.num_bytes)
            return
        for first in range(0, num_values, _PIECE_VALUES):
            num = min(_PIECE_VALUES, num_values - first)
            now, before = _read_values(ours, dtype, num), _read_values(theirs, other.header.dtype, num)
            with np.errstate(over="ignore", invalid="ignore"):
                step = np.float32(alpha) * (now - before)
                wanted = now + step
                data, rounded = _to_dtype(wanted, dtype)
            if not (np.isfinite(wanted).all() and np.isfinite(rounded).all()):
                raise ModelError(
                    f"tensor {name!r}: would have values that are not finite numbers: lower alpha {alpha}, or look "
                    "whether both models are whole"
                )
            sizes.weights += _square_sum(now)
            sizes.step += _square_sum(step)
            sizes.lost += _square_sum(rounded - wanted)
            yield data


def _read_values(stream: BinaryIO, dtype: str, num: int) -> Floats:
    """Read values of a dtype as float32. Shape: (num,)."""
    data = stream.read(num * _BYTES[dtype])
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]
    return np.frombuffer(data, kind).astype(np.float32)


def _to_dtype(values: Floats, dtype: str) -> tuple[bytes, Floats]:
    """Return finite values in a dtype, as bytes, and as they will be read. Shape of both: (values,)."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        # To the nearest, and from half way to the even one.
        short = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return short.tobytes(), (short.astype(np.uint32) << 16).view(np.float32)
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]
    converted = values.astype(kind)
    return converted.tobytes(), converted.astype(np.float32)


def _square_sum(values: Floats) -> float:
    return float(np.square(values, dtype=np.float64).sum())
