"""Finds answers that differ as texts and not as token ids: a preference between them teaches nothing. Pure.

Tokenizers may drop case, accents or the form of a character. To tokenise every answer for that would take longer than
all else that becomes of it, so only those are tokenised that are the same but for such differences.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dice_core.data.records import ROWS_AT_A_TIME

Tokenise = Callable[[str], Sequence[int]]

_NO_WORD = re.compile("[^a-z0-9]+")
# Most answers differ in their first words: the rest of them is then not looked at.
_NUM_FIRST = 80


def same_tokens(
    chosen: pa.Array | pa.ChunkedArray, rejected: pa.Array | pa.ChunkedArray, tokenise: Tokenise
) -> NDArray[np.bool_]:
    """Mark the pairs whose two answers are the same token ids.

    Args:
        chosen: [pairs] texts.
        rejected: [pairs] texts.
        tokenise: a text to its ids.
    """
    same = np.zeros(len(chosen), dtype=bool)
    for start in range(0, len(chosen), ROWS_AT_A_TIME):
        texts = (column.slice(start, ROWS_AT_A_TIME).to_pylist() for column in (chosen, rejected))
        for row, (one, other) in enumerate(zip(*texts, strict=True), start):
            same[row] = one == other or (_are_alike(one, other) and list(tokenise(one)) == list(tokenise(other)))
    return same


def _are_alike(one: str, other: str) -> bool:
    first = [_ascii_words(text[:_NUM_FIRST]) for text in (one, other)]
    length = min(map(len, first))
    return first[0][:length] == first[1][:length] and _ascii_words(one) == _ascii_words(other)


def _ascii_words(text: str) -> str:
    """Return the letters and digits that no tokenizer mixes up, in small letters."""
    plain = text if text.isascii() else unicodedata.normalize("NFKD", text)
    return _NO_WORD.sub("", plain.lower())
