"""support/texts.py: what a model does not read of its texts."""
import pytest

from helpers import MODEL
from support.texts import unread
from text_encoder import T5Tokenizer


@pytest.fixture(scope="module")
def tokens() -> T5Tokenizer:
    return T5Tokenizer(MODEL / "tokenizer_2")


@pytest.mark.parametrize("text", ["make the red star blue.", "put a red-ish one there: (12)",
                                  "on 50% of it", "2x3 at 1/2", " - ", ""])
def test_words_that_t5_knows_are_not_told(tokens, text):
    """What has not three letters on end is known by them."""
    assert not unread([text], tokens)


@pytest.mark.parametrize("text, words", [
    ("make the hippo green", "1 word letter by letter, or not at all: hippo"),
    ("MAKE the (MAKE) star GREEN.", "2 words letter by letter, or not at all: MAKE, GREEN"),
    ("把背景变成绿色", "1 word letter by letter, or not at all: 把背景变成绿色"),
    ("add a 🙂", "1 word letter by letter, or not at all: 🙂"),
    ("make,blob the red", "1 word letter by letter, or not at all: blob"),
    ("cat dog hen cow", "4 words letter by letter, or not at all: cat, dog, hen, 1 more")])
def test_words_that_t5_does_not_know_are_told(tokens, text, words):
    assert unread([text, "make the red star blue"], tokens) == [f"T5 reads {words}"]


def test_ends_that_are_lost_are_told_and_counted(tokens):
    fits, long = "a star " * 13 + "a", "a star\n" * 14                       # 27 and 28, and </s>
    assert not unread([fits], tokens)
    assert unread([long, fits, long], tokens) == [
        "the model reads 28 tokens, and not the end of 2 texts; the first: "
        "a star a star a star a star a star a star a star a star a st..."]
