"""Finds prompts that a benchmark also asks, so that nobody trains on the questions they will be measured with. Pure.

The rule is that of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C): a prompt that shares a run of 13 words with
a benchmark's prompt is contaminated. A benchmark prompt with fewer words is found by equality, since a run of a few
common words says nothing. Words are compared without case and punctuation. Departures: GPT-3 ignores runs found in more
than ten documents, and cuts a document around the run; here every run counts and the whole prompt goes. Tulu 3
(arXiv 2411.15124) uses 8 words and asks that half of a prompt is covered: `decontamination_words` 8 finds more.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

# Scripts written without spaces: each character is taken as a word.
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+")


def normalised_text(text: str) -> str:
    """Return a text without differences of case, of Unicode form and of white space (NFKC and full case folding)."""
    if text.isascii():
        return " ".join(text.lower().split())
    # Unicode D146 (compatibility caseless match): folding can undo normalisation, so both are done twice.
    for form in ("NFD", "NFKD"):
        text = unicodedata.normalize(form, text).casefold()
    return " ".join(unicodedata.normalize("NFKC", text).split())


@dataclass(frozen=True)
class BenchmarkIndex:
    """The prompts of a benchmark, ready to be looked for in others."""

    num_words: int
    """Length of a run that counts as contamination."""
    runs: frozenset[tuple[str, ...]]
    short_prompts: frozenset[tuple[str, ...]]

    def contains(self, prompt: str) -> bool:
        """Return whether the prompt shares a run of words with a benchmark prompt, or equals a short one."""
        if not self.runs and not self.short_prompts:
            return False
        words = _words(prompt)
        return words in self.short_prompts or any(run in self.runs for run in _runs(words, self.num_words))


def benchmark_index(prompts: Iterable[str], num_words: int) -> BenchmarkIndex:
    """Index a benchmark's prompts by their runs of `num_words` words."""
    runs: set[tuple[str, ...]] = set()
    short_prompts: set[tuple[str, ...]] = set()
    for prompt in prompts:
        words = _words(prompt)
        if len(words) < num_words:
            short_prompts.add(words)
        else:
            runs.update(_runs(words, num_words))
    return BenchmarkIndex(num_words, frozenset(runs), frozenset(short_prompts))


def _words(text: str) -> tuple[str, ...]:
    normalised = normalised_text(text)
    # A prompt of symbols alone is one word: two of them are not the same for having no letters.
    return tuple(_WORD.findall(normalised)) or (normalised,)


def _runs(words: tuple[str, ...], length: int) -> Iterable[tuple[str, ...]]:
    return (words[start : start + length] for start in range(len(words) - length + 1))
