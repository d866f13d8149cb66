"""A model folder that is not whole is found before anything trusts it, and the faulty file is named."""

import json
import os
import struct
from pathlib import Path

import pytest

from dice_core.models import files as model_files
from dice_core.models.files import ModelError


def _fault(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        model_files.verify_model_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def _edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_whole_model_passes_and_its_parameters_are_counted(model_copy: Path, sharded_model: Path) -> None:
    # 49152 x 64 embeddings, tied; a layer has q, o 64x64, k, v 64x32, three 64x128 and two norms of 64.
    expected = 49152 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64

    assert model_files.verify_model_folder(model_copy) == expected
    assert model_files.verify_model_folder(sharded_model) == expected


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def test_truncated_weights_are_found(model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    whole = path.stat().st_size
    os.truncate(path, whole - 1)

    assert f"{path}: not a whole safetensors file ({whole - 1} bytes; " in _fault(model_copy)


@pytest.mark.parametrize("size", [0, 5, 8, 40])
def test_weights_cut_inside_the_header_are_found(model_copy: Path, size: int) -> None:
    os.truncate(model_copy / "model.safetensors", size)

    assert f"model.safetensors: not a whole safetensors file ({size} bytes; " in _fault(model_copy)


def test_bytes_after_the_weights_are_found(model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    whole = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b"x")

    assert f"{path}: not a whole safetensors file ({whole + 1} bytes; " in _fault(model_copy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_safetensors(b"[42]"), "invalid JSON in header"),
        (_safetensors(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', b"12345678"), "invalid shape"),
        (
            _safetensors(b'{"a\\n": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}', b"12345678"),
            "invalid offset for tensor `a `",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "in a Git clone: git lfs pull"),
    ],
    ids=["no header", "shape and length differ", "a gap, and a name of two lines", "Git LFS pointer"],
)
def test_weights_that_are_none_are_found(model_copy: Path, content: bytes, reason: str) -> None:
    (model_copy / "model.safetensors").write_bytes(content)

    fault = _fault(model_copy)
    assert f"model.safetensors: not a whole safetensors file ({len(content)} bytes; " in fault
    assert reason in fault


@pytest.mark.parametrize(("dtype", "num_bytes"), [("BF16", 2), ("F8_E4M3", 1), ("I64", 8)])
def test_parameters_of_types_that_numpy_lacks_are_counted(model_copy: Path, dtype: str, num_bytes: int) -> None:
    entries = {
        "scalar": {"dtype": dtype, "shape": [], "data_offsets": [0, num_bytes]},
        "matrix": {"dtype": dtype, "shape": [2, 3], "data_offsets": [num_bytes, 7 * num_bytes]},
        "__metadata__": {"format": "pt"},
    }
    content = _safetensors(json.dumps(entries).encode(), bytes(7 * num_bytes))
    (model_copy / "model.safetensors").write_bytes(content)

    assert model_files.verify_model_folder(model_copy) == 7


def test_a_missing_shard_is_found(sharded_model: Path) -> None:
    (sharded_model / "model-2.safetensors").unlink()

    assert "model-2.safetensors: missing" in _fault(sharded_model)


def test_a_missing_tensor_is_found(sharded_model: Path) -> None:
    index = sharded_model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    _edit_json(index, weight_map={**weight_map, "model.layers.9.x": "model-1.safetensors"})

    assert "lacks tensor 'model.layers.9.x'" in _fault(sharded_model)


def test_an_index_cannot_name_files_elsewhere(sharded_model: Path) -> None:
    _edit_json(sharded_model / "model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"})

    assert "names a shard '../../secret.safetensors'" in _fault(sharded_model)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("config.json", None, "config.json: missing"),
        ("config.json", "{", "config.json: cannot be read"),
        ("config.json", "[]", "config.json: must hold a JSON object, got list"),
        ("config.json", "{}", "config.json: names no model_type"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("model.safetensors", None, "model.safetensors: missing"),
    ],
)
def test_a_missing_or_broken_file_is_named(model_copy: Path, name: str, content: str | None, fault: str) -> None:
    (model_copy / name).unlink()
    if content is not None:
        (model_copy / name).write_text(content)

    assert fault in _fault(model_copy)


def test_a_sentencepiece_file_alone_is_refused_with_how_to_make_the_other(model_copy: Path) -> None:
    """The images that make pairs and train have no sentencepiece: they would fail hours after the import."""
    (model_copy / "tokenizer.json").rename(model_copy / "tokenizer.model")

    assert "a tokenizer.json is needed: where sentencepiece" in _fault(model_copy)
