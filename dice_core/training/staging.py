"""Copies a state out of a training process's way: its tensors into memory that another process reads, the rest pickled.

A copy in memory takes a fraction of the time of a file, and training goes on while the other process writes it
(`checkpoint_process.py`). A state becomes two files, for safetensors holds no structure:

    NAME.safetensors    the tensors, by number; of a plain mapping of tensors by their names, and the only file
    NAME                the structure, pickled, with the number in place of each tensor

Knows neither steps nor storage.
"""

import io
import json
import mmap
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dice_core.training.checkpoint_process import StagedFile

WEIGHTS_SUFFIX = ".safetensors"
_ALIGNMENT = 64
"""Of each tensor in the memory, and the least by which the memory grows beyond what is needed: states hardly change."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names."""


class StagingMemory:
    """Memory without a name, which a child process inherits. It grows with the largest state, and is kept."""

    def __init__(self) -> None:
        """Make it, empty. Its size is limited by the pod's memory, not by that of /dev/shm."""
        self.descriptor = os.memfd_create("checkpoint")
        self._map: mmap.mmap | None = None
        self._used = 0

    def clear(self) -> None:
        """Begin anew: what was staged has been written."""
        self._used = 0

    def stage_tensors(self, tensors: Mapping[str, Tensor], path: Path | str) -> list[StagedFile]:
        """Copy tensors by name, as safetensors would write them to the path.

        Raises:
            KeyError: of a tensor of a type that safetensors does not know.
        """
        header: dict[str, Any] = {}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        self._grow(start + size)
        end = start
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.numel() * tensor.element_size()
            self._copy(tensor, begin, end)
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin - start, end - start],
            }
        self._used = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return [StagedFile(str(path), len(text).to_bytes(8, "little") + text, start, size)]

    def stage(self, state: Any, path: Path | str) -> list[StagedFile]:
        """Copy a state of any structure. The tensors in it may be on any device.

        Args:
            state: what pickle takes, with tensors in it.
            path: of the structure; the tensors go beside it.
        """
        tensors: dict[str, Tensor] = {}
        stream = io.BytesIO()
        _Pickler(stream, tensors).dump(state)
        return [*self.stage_tensors(tensors, f"{path}{WEIGHTS_SUFFIX}"), StagedFile(str(path), stream.getvalue())]

    def _grow(self, size: int) -> None:
        if self._map is None or size > len(self._map):
            os.ftruncate(self.descriptor, size)
            # Views of the old map may still be there: it goes with the last of them.
            self._map = mmap.mmap(self.descriptor, size) if size else None

    def _copy(self, tensor: Tensor, begin: int, end: int) -> None:
        if begin == end or self._map is None:
            return
        target = torch.frombuffer(self._map, dtype=torch.uint8, count=end - begin, offset=begin)
        # As bytes: a copy between types of one size would convert.
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def load_state(path: Path | str, map_location: Any = "cpu") -> Any:
    """Return a state that was staged and written.

    Args:
        path: of the structure.
        map_location: device of the tensors.
    """
    tensors = safe_open(f"{path}{WEIGHTS_SUFFIX}", framework="pt", device=str(map_location))
    with tensors as weights, open(path, "rb") as stream:
        return _Unpickler(stream, weights).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and remembers them by number; parameters come back as plain tensors."""

    def __init__(self, stream: Any, tensors: dict[str, Tensor]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, Tensor):
            return None
        name = str(len(self._tensors))
        self._tensors[name] = value
        return name


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, weights: Any) -> None:
        super().__init__(stream)
        self._weights = weights

    def persistent_load(self, name: str) -> Tensor:
        tensor: Tensor = self._weights.get_tensor(name)
        return tensor
