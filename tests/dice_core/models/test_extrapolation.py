"""Weights moved further along a step: by hand, every dtype against torch, and files that do not belong together."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dice_core.models import extrapolation
from dice_core.models.extrapolation import StepSizes, extrapolate
from dice_core.models.files import ModelError

pytestmark = pytest.mark.slow  # torch is imported


def write(folder: Path, tensors: dict[str, torch.Tensor], *, cuts: int = 1) -> Path:
    """Write weights in one file, or cut into several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if cuts == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(cuts):
        file = f"model-{number + 1:05d}-of-{cuts:05d}.safetensors"
        names = sorted(tensors)[number::cuts]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def moved(folder: Path, policy: torch.Tensor, previous: torch.Tensor, alpha: float) -> tuple[torch.Tensor, StepSizes]:
    ours, theirs = write(folder / "policy", {"w": policy}), write(folder / "previous", {"w": previous})
    sizes = extrapolate(ours, theirs, folder / "out", alpha)
    return read(folder / "out")["w"], sizes


def test_each_weight_goes_on_by_alpha_times_its_step(tmp_path):
    policy, previous = torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), torch.tensor([[0.0, 2.0], [-1.0, 1.5]])
    out, sizes = moved(tmp_path, policy, previous, 0.5)
    assert out.tolist() == [[1.5, 2.0], [-4.0, 0.0]]
    # Added: 0.5, 0, -1, -0.5 to weights of 1, 2, -3, 0.5.
    assert sizes.relative_update == pytest.approx((1.5 / 14.25) ** 0.5)
    assert sizes.rounding_loss == 0.0


def test_what_rounding_takes_is_told(tmp_path):
    """Of 1 + 2^-7 (the next after 1 in bfloat16) half a step is 2^-8: half way, so to the even one, 1 + 2^-6."""
    policy, previous = (torch.tensor([value], dtype=torch.bfloat16) for value in (1 + 2**-7, 1.0))
    out, sizes = moved(tmp_path, policy, previous, 0.5)
    assert out.tolist() == [1 + 2**-6]
    assert sizes.rounding_loss == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("before", [torch.bfloat16, torch.float32], ids=str)
def test_arithmetic_is_float32_and_rounds_once_as_torch_does(tmp_path, dtype, before):
    generator = torch.Generator().manual_seed(3)
    previous = torch.randn(257, 33, generator=generator).to(before)
    policy = (previous.float() + 0.01 * torch.randn(257, 33, generator=generator)).to(dtype)
    out, _ = moved(tmp_path, policy, previous, 0.3)
    wanted = policy.float() + torch.tensor(0.3) * (policy.float() - previous.float())
    assert out.dtype == dtype
    assert torch.equal(out, wanted.to(dtype))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=50))
@settings(deadline=None)
def test_bfloat16_is_rounded_as_torch_rounds_it(values):
    numbers = np.array(values, dtype=np.float32)
    data, rounded = extrapolation._to_dtype(numbers, "BF16")
    expected = torch.from_numpy(numbers).to(torch.bfloat16)
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16), expected)
    assert rounded.tolist() == expected.float().tolist()


def test_models_that_are_cut_in_other_ways_keep_the_policys_files(tmp_path, monkeypatch):
    """In pieces of seven values, so that every tensor takes several."""
    monkeypatch.setattr(extrapolation, "_PIECE_VALUES", 7)
    policy = {name: torch.randn(5, 3) for name in "abcde"} | {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 4)}
    previous = {name: torch.randn_like(value) for name, value in policy.items()}
    # Tied weights that a policy saves once may stand in its ancestor twice.
    ours = write(tmp_path / "policy", policy, cuts=2)
    theirs = write(tmp_path / "previous", previous | {"second name": policy["a"].clone()}, cuts=3)
    steps = []
    extrapolate(ours, theirs, tmp_path / "out", 1.0, lambda *counts: steps.append(counts))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in ours.glob("*.safetensors")}
    found = read(tmp_path / "out")
    assert found.keys() == policy.keys()
    for name, value in policy.items():
        torch.testing.assert_close(found[name], 2 * value - previous[name])
    assert steps[-1][0] <= steps[-1][1]
    assert steps == sorted(steps)


def test_whole_numbers_are_copied(tmp_path):
    policy, previous = (torch.tensor([1, 5, value], dtype=torch.int64) for value in (9, 7))
    assert moved(tmp_path, policy, previous, 0.5)[0].tolist() == [1, 5, 9]


@pytest.mark.parametrize(
    ("policy", "previous", "message"),
    [
        ({"w": torch.ones(2)}, {"v": torch.ones(2)}, "lacks tensor 'w', which the policy has"),
        ({"w": torch.ones(2)}, {"w": torch.ones(3)}, "tensor 'w' has shape (3,), that of the policy (2,)"),
        ({"w": torch.ones(2)}, {"w": torch.ones(2).long()}, "tensor 'w' is of I64, that of the policy of F32"),
        (
            {"w": torch.ones(2).to(torch.float8_e4m3fn)},
            {"w": torch.ones(2).to(torch.float8_e4m3fn)},
            "tensor 'w' is of F8_E4M3, that of the policy of F8_E4M3: both must be of one of F64, F32, F16, BF16",
        ),
    ],
)
def test_models_that_do_not_belong_together_are_refused_before_anything_is_written(tmp_path, policy, previous, message):
    ours, theirs = write(tmp_path / "policy", policy), write(tmp_path / "previous", previous)
    with pytest.raises(ModelError, match=re.escape(message)):
        extrapolate(ours, theirs, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [3e38, float("nan"), float("inf")])
def test_weights_that_would_not_be_finite_are_refused_by_name(tmp_path, value):
    with pytest.raises(ModelError, match=r"^tensor 'w': would have values that are not finite numbers: lower alpha"):
        moved(tmp_path, torch.tensor([value]), torch.tensor([0.0]), 0.5)
