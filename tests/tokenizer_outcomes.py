"""What a tokenizer makes of some texts, as JSON, in a process of its own: `python -m tests.tokenizer_outcomes`.

With --hidden, torch is hidden from transformers, as in a stage that loads no model.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TEXTS = (
    "Hello, world! It's 12,345.67, isn't it?",
    "def f(x):\n\treturn  x**2  # two   spaces\n\n\n",
    " \u00c4rger nai\u0308ve \u4f60\u597d \U0001f600 <s>not a token</s> <|end|>",
    "",
)
_CHAT = [{"role": "user", "content": "Hello  there"}, {"role": "assistant", "content": "Hi\n"}]


def outcomes(folders: Sequence[Path], *, hidden: bool) -> dict[str, Any]:
    """Return what the tokenizers of model folders do, by folder, in another process."""
    command = [sys.executable, "-m", __name__, *(["--hidden"] if hidden else [])]
    given = "\n".join(map(str, folders))
    done = subprocess.run(command, input=given, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def _outcome(folder: Path) -> Any:
    from dice_core.models.loading import load_tokenizer_files

    try:
        return _what_it_does(load_tokenizer_files(folder, trust_remote_code=False))
    # Some want images or words in boxes, others a file that is not there: an outcome like any other.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _what_it_does(tokenizer: Any) -> dict[str, Any]:
    kind = type(tokenizer)
    ids = [tokenizer.encode(text, add_special_tokens=added) for text in _TEXTS for added in (False, True)]
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "ids": ids,
        "texts": [tokenizer.decode(found) for found in ids],
        "chat": tokenizer.apply_chat_template(_CHAT, tokenize=False) if tokenizer.chat_template else None,
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }


def main() -> None:
    """Read folders from standard input, a line each, and print what their tokenizers do."""
    if "--hidden" in sys.argv[1:]:
        from dice_core.models.hidden_torch import hide_torch

        hide_torch()
    found = {folder: _outcome(Path(folder)) for folder in sys.stdin.read().splitlines()}
    loaded = sys.modules.get("torch") is not None
    print(json.dumps({**found, "torch is loaded": loaded}))


if __name__ == "__main__":
    main()
