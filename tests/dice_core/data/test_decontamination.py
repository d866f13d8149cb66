from hypothesis import given
from hypothesis import strategies as st

from dice_core.data.decontamination import benchmark_index, normalised_text

LONG = "Write a short poem about the sea and the old man who sails it alone at night"  # 17 words


def test_a_prompt_that_shares_a_run_of_words_is_found_whatever_its_case_and_punctuation():
    index = benchmark_index([LONG], 13)
    assert index.contains(LONG)
    assert index.contains("Please: a SHORT poem, about the sea (and the old man) who sails it alone; thanks")
    # 12 words of the run and no more.
    assert not index.contains("a short poem about the sea and the old man who sails, please")


def test_a_short_benchmark_prompt_is_found_only_when_it_is_the_whole_prompt():
    index = benchmark_index(["What is love?"], 13)
    assert index.contains("what is LOVE")
    assert not index.contains("What is love? Answer as a biologist.")
    assert not index.contains("Who is love?")


def test_characters_count_as_words_where_words_are_not_spaced():
    sentence = "\u8bf7\u5199\u4e00\u9996\u5173\u4e8e\u5927\u6d77\u548c\u8001\u4eba\u7684\u8bd7\u6b4c"  # 14 characters
    assert benchmark_index([sentence], 13).contains("\u4f60\u597d" + sentence[:13])
    assert not benchmark_index([sentence], 13).contains("\u4f60\u597d" + sentence[:12])


def test_symbols_alone_are_compared_as_they_are():
    index = benchmark_index(["???"], 13)
    assert index.contains(" ??? ")
    assert not index.contains("!!!")


def test_no_benchmark_finds_nothing():
    assert not benchmark_index([], 13).contains("anything")


@given(st.lists(st.text()), st.text())
def test_a_benchmark_finds_all_of_its_own_prompts(prompts, prompt):
    index = benchmark_index([*prompts, prompt], 3)
    assert index.contains(prompt)
    assert index.contains(f"  {prompt}\n")


def test_texts_that_differ_in_case_width_or_spaces_are_one():
    # full-width letters, the fi ligature, sharp s, a no-break space, a combining accent
    assert normalised_text("\uff28\uff29\u00a0 \ufb01ne  Stra\u00dfe cafe\u0301 ") == "hi fine strasse caf\u00e9"
    assert normalised_text("  A\tb\n") == "a b"
    # A square KB becomes its two letters first, and only then small ones.
    assert normalised_text("512 \u3385") == normalised_text("512 kb")


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    once = normalised_text(text)
    assert normalised_text(once) == once


@given(st.text(st.characters(max_codepoint=127)))
def test_the_short_cut_for_ascii_agrees_with_the_long_way(text):
    assert normalised_text(text + "\u00e9") == " ".join((text.lower() + "\u00e9").split())
