"""Where models compute without gradients: each on one card, or spread over several where none has room for it.

A spread model runs card after card: what a part is given follows its weights. `lay_out` decides by bytes alone. Whole
models are moved by `loading.move`, and training spreads states by ZeRO in place of this.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from dice_core.models.files import ModelError
from dice_core.models.loading import move

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_FIXED_BYTES = 3 << 29
"""Of each card: two buffers of logits (output_head.py), and what kernels take."""

Parts = Mapping[str, int]
"""The parts of a model in the order in which they run, by name, and their bytes. The empty name is the whole model."""
Rooms = Mapping[str, float]
"""Bytes by device, in the order in which devices are filled."""
Layout = Mapping[str, str]
"""The device of each part."""


def working_bytes(model: "PreTrainedModel", tokens_per_batch: int) -> int:
    """Return what a forward pass needs of a card beside weights: the tensors of one layer, with a margin of a half.

    A layer of Llama holds about ten tensors of the hidden size and four of the intermediate one at its peak.
    """
    embedding: Any = model.get_input_embeddings()
    hidden: int = embedding.weight.shape[1]
    intermediate: int = getattr(model.config.get_text_config(), "intermediate_size", None) or 4 * hidden
    return tokens_per_batch * (16 * hidden + 6 * intermediate) * model.dtype.itemsize + _FIXED_BYTES


def parts_of(model: "PreTrainedModel") -> dict[str, int]:
    """Return what of a model may lie on a card of its own: layers, embeddings, norms and the head.

    transformers names the modules that compute across their children (`_no_split_modules`); without such names, and
    where weights belong to no child, a model stays whole. A weight that parts share counts with the last of them, to
    which moving the parts in their order takes it.
    """
    whole = set(model._no_split_modules or ())
    names = list(_split("", model, whole)) if whole else [""]
    sizes, seen = {}, set[int]()
    for name in reversed(names):
        module = model.get_submodule(name)
        tensors = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
        sizes[name] = sum(tensor.numel() * tensor.element_size() for i, tensor in tensors.items() if i not in seen)
        seen |= tensors.keys()
    return dict(reversed(sizes.items()))


def _split(name: str, module: "nn.Module", whole: set[str]) -> Iterator[str]:
    children = list(module.named_children())
    has_own = any(chain(module._parameters, module._buffers))
    if type(module).__name__ in whole or not children or has_own:
        yield name
        return
    for child_name, child in children:
        yield from _split(f"{name}.{child_name}" if name else child_name, child, whole)


def lay_out(models: Sequence[Parts], free: Rooms, working: int = 0) -> list[dict[str, str]] | None:
    """Choose devices for models that are there at the same time.

    Each goes whole to the first device that has room for it. One that none has room for fills the devices in order, and
    has each part on one of them.

    Args:
        models: their parts.
        free: what devices have (accelerator.free_bytes).
        working: bytes of each that weights may not take.

    Returns:
        For each model the device of its parts, or of all of it under the empty name; None: they do not fit.
    """
    left, layouts = {device: size - working for device, size in free.items()}, []
    for parts in models:
        layout = _whole(parts, left) or _spread(parts, left)
        if layout is None:
            return None
        for name, device in layout.items():
            left[device] -= parts[name] if name in parts else sum(parts.values())
        layouts.append(layout)
    return layouts


def _whole(parts: Parts, rooms: Rooms) -> dict[str, str] | None:
    size = sum(parts.values())
    return next(({"": device} for device, room in rooms.items() if room >= size), None)


def _spread(parts: Parts, rooms: Rooms) -> dict[str, str] | None:
    layout, left = {}, dict(rooms)
    devices = iter(rooms)
    device = next(devices)
    for name, size in parts.items():
        while left[device] < size:
            following = next(devices, None)
            if following is None:
                return None
            device = following
        left[device] -= size
        layout[name] = device
    return layout


def lay_out_alone(model: "PreTrainedModel", free: Rooms, working: int, advice: str) -> dict[str, str]:
    """Choose devices for a model that has them for itself.

    Args:
        model: wherever it is.
        free: see lay_out.
        working: likewise.
        advice: what a person can do if it does not fit.

    Raises:
        ModelError: it does not fit; one line with the numbers.
    """
    parts = parts_of(model)
    if layouts := lay_out([parts], free, working):
        return layouts[0]
    raise ModelError(
        f"{model.config.name_or_path or model.config.model_type}: its weights take "
        f"{sum(parts.values()) / 2**30:.1f} GiB and a batch {working / 2**30:.1f} GiB on each GPU, of which this "
        f"process has {len(free)} with {' + '.join(f'{size / 2**30:.1f}' for size in free.values())} GiB free: {advice}"
    )


def bring(model: "PreTrainedModel", layout: Layout) -> None:
    """Move a model to its devices, from wherever it is."""
    for name, device in layout.items():
        move(model.get_submodule(name), device)


def let_inputs_follow(model: "PreTrainedModel", layout: Layout) -> None:
    """Have every part move what it is given to the device that it is on when it runs: once for a model.

    accelerate's hooks would take the place of the parts' `forward`, as log-probs do with the head's, and the image that
    scores has no accelerate.
    """
    for name in layout:
        if name:
            model.get_submodule(name).register_forward_pre_hook(_follow, with_kwargs=True)


def _follow(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    first = next(chain(module.parameters(), module.buffers()), None)
    return (args, kwargs) if first is None else (_moved(args, first.device), _moved(kwargs, first.device))


def _moved(value: Any, device: "torch.device") -> Any:
    """Return a value with the tensors and masks in it on a device."""
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device) for part in value)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device) if hasattr(value, "to") else value
