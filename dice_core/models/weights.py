"""Reads safetensors files from end to end: their digest, and whether all values are finite, in one pass.

`files.py` reads their headers. Loads no torch, and holds a small piece of a file at a time.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dice_core.models.files import ModelError, shard_names
from dice_core.progress import Progress, log
from dice_core.storage.manifest import FileEntry

_MB = 1_000_000
# Small enough to stay in a processor's cache between the check and the digest.
_PIECE_BYTES = 1 << 18

# The bits of the exponent, for a dtype of safetensors and unsigned integers of its size: where all of them are set, the
# value is infinite or not a number. Smaller types are quantised, and refused elsewhere.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


class ReadBytes:
    """Says how far files are read that are read one after another."""

    def __init__(self, what: str, num_bytes: int) -> None:
        """Take what begins each line, and the size of all files."""
        self._progress, self._num_done, self._num_all = Progress(what, "MB", tells_end=False), 0, num_bytes

    def add(self, num_bytes: int) -> None:
        """Take what has been read since."""
        self._num_done += num_bytes
        self._progress(self._num_done // _MB, self._num_all // _MB)


def describe_weights(path: Path, read: ReadBytes | None = None) -> FileEntry:
    """Return size and digest of a whole safetensors file whose values are all finite.

    Args:
        path: of the file.
        read: is told what has been read.

    Raises:
        ModelError: a tensor has values that are not finite numbers.
    """
    digest = hashlib.sha256()
    for piece in _finite_pieces(path):
        digest.update(piece)
        if read is not None:
            read.add(len(piece))
    return FileEntry(path.stat().st_size, digest.hexdigest())


def check_finite(folder: Path) -> None:
    """Check that all weights of a model folder are finite numbers.

    Raises:
        ModelError: a tensor has values that are not.
    """
    paths = [folder / shard for shard in shard_names(folder)]
    read = ReadBytes("checking that weights are finite", sum(path.stat().st_size for path in paths))
    for path in paths:
        for piece in _finite_pieces(path):
            read.add(len(piece))


def _finite_pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, piece by piece. Says which matrices hold nothing but zeros."""
    zeros: list[str] = []
    with path.open("rb") as stream:
        size = stream.read(8)
        header = stream.read(int.from_bytes(size, "little"))
        yield size + header
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        # One after another without gaps, which safetensors itself has checked.
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            is_zero = len(entry["shape"]) > 1 and start < end
            for place in range(start, end, _PIECE_BYTES):
                piece = stream.read(min(_PIECE_BYTES, end - place))
                if not _is_finite(piece, entry["dtype"]):
                    raise ModelError(
                        f"{path}: tensor {name!r} has values that are not finite numbers (NaN or infinite): the model "
                        "is broken; take another checkpoint"
                    )
                is_zero = is_zero and piece.count(0) == len(piece)
                yield piece
            if is_zero:
                zeros.append(name)
    if zeros:
        log(
            f"{path}: {len(zeros)} weights are nothing but zeros, such as {zeros[0]!r}: files look so whose download "
            "was not whole; fetch the model again unless it is meant"
        )


def _is_finite(piece: bytes, dtype: str) -> bool:
    if dtype not in _EXPONENTS:
        return True
    unsigned, exponent = _EXPONENTS[dtype]
    exponents = np.frombuffer(piece, dtype=unsigned) & unsigned(exponent)  # (values,)
    return not exponents.size or int(exponents.max()) != exponent
