"""What an endpoint has answered, by content: nothing is paid for twice, however often a stage is started again.

Where the answers are kept is the caller's: a stage gives those of its earlier attempts, and a function that stores new
ones (`stages/judged_answers.py`). Only answers are kept, no failures: these are tried again.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any

Record = Mapping[str, Any]
"""An answer as plain JSON types."""


@dataclass(frozen=True)
class Reply:
    """An answer of an endpoint, and what it is paid by."""

    text: str
    first_tokens: dict[str, float]
    """The likeliest first tokens with their log-probs in nats; empty where the server gave none."""
    input_tokens: int
    output_tokens: int


class AnswerCache:
    """Answers by the digest of what was asked of whom."""

    def __init__(
        self,
        known: Iterable[Record] = (),
        store: Callable[[list[Record]], None] | None = None,
        *,
        num_together: int = 64,
    ) -> None:
        """Take the answers of earlier attempts.

        Args:
            known: records that `store` was given before.
            store: keeps new records; nothing is kept by default.
            num_together: records that are stored at a time: so many are paid for again if the process is killed.
        """
        names = [field.name for field in fields(Reply)]
        self._replies = {record["key"]: Reply(**{name: record[name] for name in names}) for record in known}
        self._store, self._num_together = store, num_together
        self._new: list[Record] = []
        replies = self._replies.values()
        self._sent = sum(reply.input_tokens for reply in replies)
        self._came = sum(reply.output_tokens for reply in replies)

    def get(self, key: str) -> Reply | None:
        """Return the answer to a request; None: it was never answered."""
        return self._replies.get(key)

    def add(self, key: str, reply: Reply) -> None:
        """Keep an answer; with enough others it is stored."""
        self._replies[key] = reply
        self._sent, self._came = self._sent + reply.input_tokens, self._came + reply.output_tokens
        self._new.append({"key": key, **asdict(reply)})
        if len(self._new) >= self._num_together:
            self.flush()

    def flush(self) -> None:
        """Store what is not stored yet."""
        new, self._new = self._new, []
        if new and self._store:
            self._store(new)

    def __len__(self) -> int:
        return len(self._replies)

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens that were sent and came back, for all answers there are."""
        return self._sent, self._came


def digest(asked: Mapping[str, Any]) -> str:
    """Return the key of a request: its content and everything that decides the answer."""
    return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
