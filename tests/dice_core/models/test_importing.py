"""Models are imported whole or not at all, fetched once, and saved as they are loaded."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dice_core.models import importing as models
from dice_core.models.cache import fetch_model
from dice_core.models.files import TRUST_KEY, ModelError, trusts_remote_code
from dice_core.models.importing import import_model
from dice_core.models.loading import context_length, load_model, load_tokenizer
from dice_core.models.saving import save_model
from dice_core.settings.base import DType
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files, read_manifest

pytestmark = pytest.mark.slow


def _edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Import.


def test_an_imported_folder_is_in_storage_with_its_manifest(model_copy: Path, s3: str) -> None:
    uri = f"{s3}/models/once"
    first = import_model(str(model_copy), uri)

    assert first.stage == "import-model"
    assert set(first.files) == {path.name for path in model_copy.iterdir()}
    assert {found.key for found in open_storage(uri).list()} == {*first.files, "manifest.json"}


def test_the_same_source_again_returns_at_once(
    model_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "imported"
    first = import_model(str(model_copy), str(place))
    inodes = {path.name: path.stat().st_ino for path in place.iterdir()}
    assert capfd.readouterr().err.count("import-model: ") == 1

    assert import_model(str(model_copy), str(place)) == first
    assert capfd.readouterr().err == "", "nothing is brought again"
    # A file that is uploaded again is another one.
    assert {path.name: path.stat().st_ino for path in place.iterdir()} == inodes


def test_another_source_at_the_same_place_is_refused(model_copy: Path, sharded_model: Path, tmp_path: Path) -> None:
    import_model(str(model_copy), str(tmp_path / "imported"))

    with pytest.raises(StorageError, match=r"holds a model from .*, not from"):
        import_model(str(sharded_model), str(tmp_path / "imported"))


def test_a_place_of_another_stage_is_refused_as_such(model_copy: Path, tmp_path: Path) -> None:
    publish_files(str(tmp_path / "data"), {}, Manifest(stage="prepare-data", fingerprint="f", files={}))

    with pytest.raises(StorageError, match=r"holds the result of prepare-data, which import-model leaves alone"):
        import_model(str(model_copy), str(tmp_path / "data"))


def test_a_published_model_is_copied_by_its_manifest(model_copy: Path, s3: str, tmp_path: Path) -> None:
    first = import_model(str(model_copy), f"{s3}/models/first")
    second = import_model(f"{s3}/models/first", str(tmp_path / "second"))

    assert second.files == first.files
    assert second.inputs == {"model": f"{s3}/models/first@{first.content_digest}"}
    assert import_model(f"{s3}/models/first", f"{s3}/models/first") == first


def test_plain_files_in_storage_can_be_imported(sharded_model: Path, s3: str, tmp_path: Path) -> None:
    raw = open_storage(f"{s3}/raw")
    for path in sharded_model.iterdir():
        raw.upload(path, path.name)
    raw.write_bytes("original/consolidated.pth", b"not wanted")

    imported = import_model(f"{s3}/raw", str(tmp_path / "imported"))

    assert set(imported.files) == {path.name for path in sharded_model.iterdir()}


def test_a_changed_published_model_is_refused(model_copy: Path, tmp_path: Path) -> None:
    import_model(str(model_copy), str(tmp_path / "first"))
    (tmp_path / "first" / "config.json").write_text("{}")

    with pytest.raises(StorageError, match=r"config.json: .* its manifest says"):
        import_model(str(tmp_path / "first"), str(tmp_path / "second"))


def test_a_broken_model_leaves_nothing(model_copy: Path, tmp_path: Path) -> None:
    os.truncate(model_copy / "model.safetensors", 1000)

    with pytest.raises(ModelError):
        import_model(str(model_copy), str(tmp_path / "imported"))
    assert open_storage(str(tmp_path / "imported")).list() == []


@pytest.mark.parametrize("place", ["folder", "storage"])
def test_pickled_weights_are_refused(model_copy: Path, s3: str, tmp_path: Path, place: str) -> None:
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    source = str(model_copy)
    if place == "storage":
        source = f"{s3}/pickled"
        for path in model_copy.iterdir():
            open_storage(source).upload(path, path.name)

    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*convert them to safetensors"):
        import_model(source, str(tmp_path / "imported"))


def test_pickles_and_second_copies_beside_safetensors_stay_behind(model_copy: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "optimizer.pt", "payload.py"):
        (model_copy / name).write_bytes(b"x")

    imported = import_model(str(model_copy), str(tmp_path / "imported"))

    assert sorted(name for name in imported.files if not name.endswith((".json", ".jinja"))) == ["model.safetensors"]


_CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path(__file__).with_name("ran").touch()
class CustomConfig(LlamaConfig):
    model_type = "custom-llama"
class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


@pytest.fixture
def model_with_code(model_copy: Path) -> Path:
    """Return a model whose config and weights are classes of its own."""
    (model_copy / "custom.py").write_text(_CODE)
    classes = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomForCausalLM"}
    names = {"model_type": "custom-llama", "architectures": ["CustomForCausalLM"]}
    _edit_json(model_copy / "config.json", **names, auto_map=classes)
    return model_copy


@pytest.mark.parametrize("own_claim", [{}, {TRUST_KEY: True}])
def test_code_inside_a_model_is_refused(model_with_code: Path, tmp_path: Path, own_claim: dict[str, bool]) -> None:
    _edit_json(model_with_code / "config.json", **own_claim)

    with pytest.raises(ModelError, match=r"code inside the model.*trust_remote_code"):
        import_model(str(model_with_code), str(tmp_path / "imported"))
    assert read_manifest(str(tmp_path / "imported")) is None


def test_code_inside_a_model_travels_when_it_is_allowed(
    model_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    imported = import_model(str(model_with_code), str(tmp_path / "imported"), trust_remote_code=True)

    assert "custom.py" in imported.files
    assert trusts_remote_code(fetch_model(str(tmp_path / "imported"), tmp_path / "cache"))


def test_a_model_cannot_allow_its_own_code(model_copy: Path, tmp_path: Path) -> None:
    _edit_json(model_copy / "config.json", **{TRUST_KEY: True})
    import_model(str(model_copy), str(tmp_path / "imported"))

    assert not trusts_remote_code(fetch_model(str(tmp_path / "imported"), tmp_path / "cache"))


def test_an_empty_address_is_explained(s3: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing is there"):
        import_model(f"{s3}/nothing", str(tmp_path / "imported"))


def test_a_gguf_file_becomes_float32_safetensors(smollm: Path) -> None:
    manifest = read_manifest(str(smollm))
    config = json.loads((smollm / "config.json").read_text())

    assert manifest is not None and manifest.metrics["num_parameters"] == 134_515_008
    assert int(manifest.metrics["num_bytes"]) > 4 * 134_515_008
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert load_tokenizer(smollm).decode([1]) == "<|im_start|>"


def test_a_cut_gguf_file_is_refused(smollm_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with smollm_gguf.open("rb") as stream:
        cut.write_bytes(stream.read(5_000_000))

    with pytest.raises(ModelError, match=r"cut\.gguf: cannot be read as a GGUF model: it is truncated"):
        import_model(str(cut), str(tmp_path / "imported"))


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from dice_core.models.files import ModelError
from dice_core.models.importing import import_model
try:
    import_model(sys.argv[1], sys.argv[2])
except ModelError as error:
    print(error)
"""


def test_a_gguf_file_without_torch_is_refused_with_where_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF")
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(path), str(tmp_path / "imported")]
    printed = subprocess.check_output(command, cwd=Path(models.__file__).parents[2], text=True)
    assert printed.startswith(f"{path}: a GGUF file is converted where PyTorch is installed: run `dice import-model`")


# The cache of a machine.


def _fetch(uri: str, cache: Path, start, results) -> None:
    start.wait()
    results.put(str(fetch_model(uri, cache)))


def test_two_processes_at_once_download_once(
    model_copy: Path, s3: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, cache = f"{s3}/models/both", tmp_path / "cache"
    imported = import_model(str(model_copy), uri)
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_fetch, args=(uri, cache, start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()

    assert folders == {str(cache / imported.content_digest)}
    assert capfd.readouterr().err.count("model: downloading") == 1


def test_a_fetched_model_is_taken_from_the_cache(model_copy: Path, s3: str, tmp_path: Path) -> None:
    uri = f"{s3}/models/cached"
    import_model(str(model_copy), uri)
    first = fetch_model(uri, tmp_path / "cache")
    # Downloaded again, it would be missed.
    assert open_storage(uri).delete("model.safetensors") == 1

    assert fetch_model(uri, tmp_path / "cache") == first


@contextmanager
def as_nobody_special() -> Iterator[int]:
    """Run as a user who is not root, as the images do; gives its id."""
    user, is_root = os.geteuid(), os.geteuid() == 0
    if is_root:
        os.seteuid(10001)
    try:
        yield os.geteuid()
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("cache", [".", "models"])
def test_a_cache_that_the_user_may_not_write_is_told_with_the_user(
    cache: str, model_copy: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume whose root folder belongs to root, in a pod without fsGroup."""
    import_model(str(model_copy), uri := f"{s3}/models/unkept/{cache.strip('.')}x")
    # By a relative path: only whoever runs the tests may pass the folders above.
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    with as_nobody_special() as user, pytest.raises(StorageError) as caught:
        fetch_model(uri, Path(cache))
    tmp_path.chmod(0o755)
    assert f"user {user} cannot write the model cache (Permission denied): let it write there" in str(caught.value)


def test_the_cache_is_where_the_variable_says(
    model_copy: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(str(model_copy), uri := f"{s3}/models/elsewhere")
    monkeypatch.setenv("DICE_CACHE", str(tmp_path / "elsewhere"))

    assert fetch_model(uri).parent == tmp_path / "elsewhere"


def test_a_cut_download_is_not_trusted_and_goes_on(
    model_copy: Path, s3: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, cache = f"{s3}/models/cut", tmp_path / "cache"
    imported = import_model(str(model_copy), uri)
    unfinished = cache / f"{imported.content_digest}.unfinished"
    unfinished.mkdir(parents=True)
    shutil.copy(model_copy / "model.safetensors", unfinished)
    (unfinished / "tokenizer.json").write_text("half a tok")
    (unfinished / "config.json.1f2e3d4c").write_text("a temporary name")

    folder = fetch_model(uri, cache)

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in model_copy.iterdir()
    }
    num_files = len(imported.files)
    assert f"downloading {num_files - 1} of {num_files} files" in capfd.readouterr().err


def test_what_is_not_finished_is_not_fetched(model_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no manifest\.json there"):
        fetch_model(str(model_copy), tmp_path / "cache")


# Loading and saving.


def test_a_loaded_model_is_deterministic(model_copy: Path) -> None:
    _edit_json(model_copy / "config.json", attention_dropout=0.5)
    loaded = load_model(model_copy, "float32")
    ids = torch.tensor([[1, 2, 3, 4]])

    assert not loaded.training and not loaded.config.use_cache and loaded.config.attention_dropout == 0.0
    loaded.train()
    assert torch.equal(loaded(ids).logits, loaded(ids).logits)
    assert loaded(ids).past_key_values is None


def test_missing_weights_are_an_error_and_not_random(model_copy: Path) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model_copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"1 weights are missing .* 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(model_copy, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_comes_back(model_copy: Path, tmp_path: Path, dtype: DType) -> None:
    loaded, expected = load_model(model_copy, "float32"), getattr(torch, dtype)
    save_model(loaded, load_tokenizer(model_copy), tmp_path / "saved", dtype)

    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {expected}
    assert "lm_head.weight" not in saved, "tied to the embeddings and saved once"
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["dtype"] == dtype and config["use_cache"] is True
    again = load_model(tmp_path / "saved", "float32").state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(again[name], value.to(expected).float()), name
    assert loaded.dtype == torch.float32 and not loaded.config.use_cache, "the model itself stays as it is"


def test_sampling_settings_that_transformers_would_not_write_do_not_stop_a_save(
    model_copy: Path, tmp_path: Path
) -> None:
    _edit_json(model_copy / "generation_config.json", temperature=0.6, top_p=0.9, do_sample=False)

    save_model(load_model(model_copy, "float32"), load_tokenizer(model_copy), tmp_path / "saved", "float32")

    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["temperature"] == 0.6


def test_the_context_length_is_read(model_copy: Path) -> None:
    assert context_length(load_model(model_copy, "float32").config) == 2048


def test_importing_the_module_loads_no_torch() -> None:
    code = "import sys, dice_core.models; print([n for n in ('torch', 'transformers', 'boto3') if n in sys.modules])"
    root = Path(models.__file__).parents[2]

    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root).strip() == "[]"
