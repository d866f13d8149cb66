"""Answers are the same where a tokenizer cannot tell them apart, and only then."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dice_core.data.decontamination import normalised_text
from dice_core.data.same_tokens import same_tokens


def folded(text: str) -> list[int]:
    """Tokenise as tokenizers do that fold case and forms: to a token a character."""
    return [ord(character) for character in normalised_text(text)]


def test_texts_that_a_tokenizer_cannot_tell_apart_are_the_same():
    chosen = ["Yes, it is.", "Yes.", "ﬁne", "日本", "cafe\u0301", "No."]
    rejected = ["YES, it  is.", "Yes!", "fine", "中国", "café", "No."]
    same = [True, False, True, False, True, True]
    assert same_tokens(pa.array(chosen), pa.array(rejected), folded).tolist() == same
    chunked = pa.chunked_array([chosen[:2], chosen[2:]]), pa.chunked_array([rejected])
    assert same_tokens(*chunked, folded).tolist() == same
    # A tokenizer without a token for either: both are unknown.
    assert same_tokens(pa.array(["日本"]), pa.array(["中国"]), lambda text: [0]).tolist() == [True]


def test_few_texts_are_tokenised():
    seen: list[str] = []

    def tokenise(text: str) -> list[int]:
        seen.append(text)
        return folded(text)

    long = "word " * 100
    same_tokens(pa.array(["a dog", long, "A cat"]), pa.array(["a cat", f"{long}more", "a cat"]), tokenise)
    assert seen == ["A cat", "a cat"]


@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x2FF))] * 2)))
def test_nothing_is_missed_that_folds_to_the_same(pairs):
    chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
    found = same_tokens(pa.array(chosen, pa.string()), pa.array(rejected, pa.string()), folded).tolist()
    assert found == [folded(one) == folded(other) for one, other in pairs]
