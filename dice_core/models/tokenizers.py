"""What turns text into token ids, as a digest that a manifest carries, and where two models disagree about it.

Ids of one tokenizer mean nothing to a model of another. The digests are of what a tokenizer does, not of its files,
which every version of transformers writes in its own way.
"""

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words, numbers, code, white space, accents in two forms, other scripts: what normalisers and splitters differ in.
_PROBES = (
    "Hello, world! It's 12,345.67 \u20ac, isn't it?",
    "def f(x):\n\treturn  x**2  # two   spaces\n\n\n",
    "\u00c4rger na\u00efve nai\u0308ve \u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600 https://a.b/c?d=e_f",
)


def text_digests(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """Return hex digests by name: `tokenizer`, how text becomes ids, and `chat_template`, how a prompt becomes text."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in _PROBES]
    return {
        "tokenizer": _digest([sorted(tokenizer.get_vocab().items()), ids]),
        "chat_template": _digest(tokenizer.chat_template),
    }


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def disagreement(policy: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> str:
    """Return why ids of the policy's tokenizer do not mean the same to another model; empty if they do.

    The other may know more tokens, and need not know the one that only pads.
    """
    known = {token_id: token for token, token_id in other.get_vocab().items()}
    for token, token_id in sorted(policy.get_vocab().items(), key=lambda item: item[1]):
        if token_id not in known and token_id != policy.pad_token_id:
            return f"it has no token {token_id}, the policy's {token!r}"
        if token_id in known and known[token_id] != token:
            return f"token {token_id} is {known[token_id]!r} in it and {token!r} in the policy's"
    for text in _PROBES:
        if policy.encode(text, add_special_tokens=False) != other.encode(text, add_special_tokens=False):
            return f"it splits {text[:20]!r}... into other tokens than the policy's"
    return ""
