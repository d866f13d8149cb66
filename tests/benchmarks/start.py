"""How a process starts that tokenises and loads no model: prepare-data, pair, import-responses.

The peer's way is ours as it was: transformers loads torch beside the tokenizer.
"""

from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.measure import Comparison, Timed, Values, stopwatch
from tests.benchmarks.work import Work


def ours(folder: Path) -> Timed:
    """Begin as `dice pair` does, and make token ids."""
    from dice_core.stages.light_start import begin

    begin("pair")
    return _token_ids(folder)


def with_torch(folder: Path) -> Timed:
    """Make token ids in a process in which torch is to be found."""
    return _token_ids(folder)


def _token_ids(folder: Path) -> Timed:
    with stopwatch() as watch:
        import dice_core.stages.pair  # noqa: F401
        from dice_core.data.chat import chat_format
        from dice_core.data.settings import ChatConfig
        from dice_core.models.loading import load_tokenizer

        template = chat_format(load_tokenizer(Work(folder).policy), ChatConfig())
        ids = template.prompt_token_ids("What is the capital of France?")
    return Timed.of(watch, {"ids": ids})


def same_ids(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether a token id differs."""
    return "" if [values["ids"] for values in ours] == [values["ids"] for values in peer] else "other token ids"


COMPARISONS = [
    Comparison(
        "start",
        "the stage's modules and its tokenizer, with torch; ours hides it; whole processes",
        ours=("start:ours",),
        peer=("start:with_torch",),
        clock="process",
        check=same_ids,
        least_ratio=2,
    )
]
