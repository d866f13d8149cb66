"""Without torch, a tokenizer is the same: every class of a language model, and a real one."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dice_core.models import hidden_torch
from dice_core.models.hidden_torch import torch_hidden
from dice_core.stages.light_start import begin
from tests.tokenizer_outcomes import outcomes

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
CORPUS = ["Hello, world! def f(x): return x**2", "It's 12,345.67, isn't it?", "two   spaces, and more of them"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet))
    return made


def pieces() -> Tokenizer:
    """As SentencePiece's BPE is converted, such as Llama 2's and Mistral's."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = [*SPECIAL.values(), *(f"<0x{number:02X}>" for number in range(256))]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=names))
    return made


def write(folder: Path, tokenizer: Tokenizer, model_type: str, tokenizer_class: str | None) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    config = {**SPECIAL, **named, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def every_choice(folder: Path) -> Iterable[Path]:
    """Write a model folder for every class of a language model, and one in which it stands beside a Llama's config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    whole, parts = byte_level(), pieces()
    types = {name: model_type for model_type, name in TOKENIZER_MAPPING_NAMES.items() if name}
    types = {name: kind for name, kind in types.items() if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for name, model_type in {**types, "LlamaTokenizer": "mistral", "CodeLlamaTokenizer": "llama"}.items():
        yield write(folder / "own" / name, whole, model_type, name)
        yield write(folder / "llama" / name, parts, "llama", f"{name.removesuffix('Fast')}Fast")
    yield write(folder / "fast", whole, "llama", "PreTrainedTokenizerFast")


@pytest.mark.slow
def test_every_class_of_a_language_model_makes_the_same_of_texts(smollm: Path, tmp_path: Path) -> None:
    """Class, token ids, decoded texts, rendered chats, special tokens; what it cannot read, it cannot read in both."""
    folders = [smollm, *every_choice(tmp_path)]
    with_torch, without = (outcomes(folders, hidden=hidden) for hidden in (False, True))
    assert (with_torch.pop("torch is loaded"), without.pop("torch is loaded")) == (True, False)
    assert {name: found for name, found in without.items() if found != with_torch[name]} == {}
    classes = {found["class"].rpartition(".")[2] for found in without.values() if isinstance(found, dict)}
    assert {"LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer", "CohereTokenizer", "TokenizersBackend"} <= classes
    assert len(classes) > 10
    assert "<|im_start|>user\nHello  there" in without[str(smollm)]["chat"]


@pytest.mark.slow
def test_a_command_that_only_tokenises_starts_without_torch_and_reads_data_sets(tmp_path: Path) -> None:
    """datasets loads torch where its name stands among the modules, to tell how a table is hashed."""
    script = f"""
import sys
from pathlib import Path
sys.argv = ["dice", "pair", "--help"]
from dice_core.__main__ import main
from dice_core.models.loading import load_tokenizer_files
try:
    main()
except SystemExit:
    load_tokenizer_files(Path({str(write(tmp_path / "model", pieces(), "llama", None))!r}), False)
    import datasets
    assert datasets.Dataset.from_dict({{"prompt": ["a"]}}).num_rows == 1
    sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one that has decided nothing and loaded no torch."""
    monkeypatch.setattr(hidden_torch, "_wanted", [])
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def is_hidden() -> bool:
    with torch_hidden():
        return importlib.util.find_spec("torch") is None


@pytest.mark.usefixtures("fresh")
def test_torch_is_hidden_from_the_stages_that_load_no_model_alone() -> None:
    for name in ("score", "evaluate", "train", "extrapolate", "push", "--help", ""):
        begin(name)
        assert not is_hidden()
    for name in ("prepare-data", "pair", "import-responses"):
        hidden_torch._wanted.clear()
        begin(name)
        assert is_hidden() and "torch" not in sys.modules


@pytest.mark.usefixtures("fresh")
def test_torch_that_is_loaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", loaded)
    begin("pair")
    with torch_hidden():
        assert sys.modules["torch"] is loaded
    assert sys.modules["torch"] is loaded
