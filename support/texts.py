"""What a model does not read of its texts: long ones' ends, and words that its T5 does not know.

sample.edits() tells it of an instruction, training and scoring of all their rows.
"""
import re
import string
from collections import Counter
from collections.abc import Iterable

from support.words import counted
from text_encoder import T5Tokenizer

SHOWN = 3                                                # of the words
START = "\u2581"                                         # of a piece that begins a word
LONG = re.compile(r"[^\W\d_]{3}")                        # three letters in a row
BETWEEN = re.compile(rf"[\s{re.escape(string.punctuation)}]+")       # words


def cuts(text: str, tokens: T5Tokenizer) -> bool:
    """Whether a text is too long, so that its end is lost."""
    short = text.isascii() and len(text) < tokens.length - 1     # a token a letter, and two of T5's
    return not short and bool(tokens.model.encode(text).overflowing)


def knows(word: str, tokens: T5Tokenizer) -> bool:
    """Whether T5 reads a word: not by pieces it lacks, nor three letters or more one by one."""
    ids = set(tokens.model.encode(word).ids)             # most are of the padding
    pieces = set(map(tokens.model.id_to_token, ids)) - {"</s>", "<pad>"}
    longest = max((len(piece.lstrip(START)) for piece in pieces), default=0)
    return "<unk>" not in pieces and (longest > 1 or not LONG.search(word))


def unread(texts: Iterable[str], tokens: T5Tokenizer) -> list[str]:
    """Lines about what is lost of texts; one that is there several times counts as often."""
    found, lines = Counter(texts), []
    cut = [text for text in found if cuts(text, tokens)]
    if cut:
        first = " ".join(cut[0].split())
        lines.append(f"the model reads {tokens.length} tokens, and not the end of "
                     f"{counted(sum(found[text] for text in cut), 'text')}; the first: "
                     f"{first[:60]}{'...' * (len(first) > 60)}")
    words = dict.fromkeys(word for text in found for word in BETWEEN.split(text))
    strange = [word for word in words if word and not knows(word, tokens)]
    if strange:
        more = f", {len(strange) - SHOWN:,} more" if len(strange) > SHOWN else ""
        lines.append(f"T5 reads {counted(len(strange), 'word')} letter by letter, or not at all: "
                     f"{', '.join(word[:30] for word in strange[:SHOWN])}{more}")
    return lines
