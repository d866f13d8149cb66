"""What a judge behind an endpoint has answered, kept with a stage's parts: no attempt pays for them twice.

Only for endpoints: what vLLM says costs a minute, and no money.
"""

import json
from hashlib import sha256
from pathlib import Path

from dice_core.judges.answer_cache import AnswerCache, Record
from dice_core.progress import log
from dice_core.stages.runner import StageContext
from dice_core.storage.contract import UnfitError

_PREFIX, _SUFFIX = "judge-answers-", ".jsonl"
_DIGITS = 12


def answer_cache(context: StageContext) -> AnswerCache:
    """Return the answers of a stage's earlier attempts; new ones become parts of it, some at a time.

    Raises:
        StorageError: a part is missing, was changed, or is of another form.
    """
    known: list[Record] = []
    for name in sorted(context.parts):
        if name.startswith(_PREFIX):
            known += _read(context, name)
    if known:
        log(f"{context.manifest_fields['stage']}: {len(known)} answers of the judge are known from earlier attempts")

    def store(records: list[Record]) -> None:
        text = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
        # By its content: what two attempts at a time were told is kept of both.
        path = context.folder / f"{_PREFIX}{sha256(text.encode()).hexdigest()[:_DIGITS]}{_SUFFIX}"
        path.write_text(text)
        context.publish_part(path.name, path)
        path.unlink()

    return AnswerCache(known, store)


def _read(context: StageContext, name: str) -> list[Record]:
    key = context.parts[name].key
    path: Path = context.stored.fetch(context.folder / "answers", [key])[key]
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UnfitError(f"{context.uri}/{key}: no answers of a judge ({error}): pass --overwrite") from None
