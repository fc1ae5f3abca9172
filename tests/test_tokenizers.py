"""Our tokenizers against transformers', on texts that people write and texts that nobody should."""
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import text_encoder
import weights

MODEL = Path(weights.__file__).parent / "tiny" / "model"
WORDS = """the a red Blue cube put on left background it's don't I'm WE'LL you've 's ' make 12 3.5
1,000 # @user straße Éclair naïve e\u0301 A\u030a ﬁ Å ① ½ 東京 こんにちは
привет سلام नमस्ते ñ é İ ǅ ß ſ \u200b \ufeff \x00 \x7f ▁ _ ▁the Ġ
😀 👍🏽 👩‍👩‍👧 🏳️‍🌈 ! !!! ?! ... -- <| |> < > | </ <extra_id_ endoftext
startoftext </w> \\n a/b c-d (e) "f" [g]""".split()
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "<|STARTOFTEXT|>",
           "<|StartOfText|>", "<|EndOfText|>", "</s>", "</S>", "<s>", "<pad>", "<PAD>", "<unk>",
           "<extra_id_0>", "<extra_id_3>", "<extra_id_99>", "<extra_id_100>", "<EXTRA_ID_3>"]
SPACE = ["", " ", "  ", "     ", "\t", "\n", " \n ", "\r\n", "\u00a0", "\u2003", "\u2028", "\u3000"]
SENTENCES = ["", " ", "a", "Put the red cube to the left of the blue ball.",
             "Make  it   snow,\nplease!", "</s>", "<pad>", "<|endoftext|>", "x<|endoftext|>y",
             "<|ENDOFTEXT|>!!", "a <extra_id_3> b", "word " * 500, "w" * 500, "!" * 300,
             "😀" * 100, "<|startoftext|>" * 50, "it's" * 40]
RANGES = [(0x20, 0x7f), (0xa0, 0x250), (0x300, 0x530), (0x590, 0xe00), (0x2000, 0x2c00),
          (0x3000, 0xa000), (0xac00, 0xd7a4), (0xe000, 0xfffe), (0x10000, 0x11000),
          (0x1f300, 0x1fb00)]                            # no surrogates


def texts(count: int) -> list[str]:
    """The sentences above, then random rows of words, special tokens, spaces, or of characters."""
    draw = random.Random(0)

    def row() -> str:
        length = draw.choice([1, 2, 3, 4, 6, 10, 40])
        if draw.random() < 0.2:
            return "".join(chr(draw.randrange(*draw.choice(RANGES))) for _ in range(length))
        pieces = (draw.choice(SPECIAL if draw.random() < 0.25 else WORDS) for _ in range(length))
        return "".join(draw.choice(SPACE) + piece for piece in pieces)
    return SENTENCES + [row() for _ in range(count - len(SENTENCES))]


def assert_same(ours: object, peer: object, lines: list[str]) -> None:
    padded = peer(lines, padding="max_length", truncation=True, max_length=peer.model_max_length)
    found, expected = ours(lines), torch.tensor(padded.input_ids)
    assert found.shape == expected.shape == (len(lines), ours.length) and found.dtype == torch.int64
    wrong = (found != expected).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} differ, shortest: {min((lines[i] for i in wrong), key=len)!r}"


def test_t5_equals_transformers() -> None:
    folder = MODEL / "tokenizer_2"
    assert_same(text_encoder.T5Tokenizer(folder),
                transformers.T5TokenizerFast.from_pretrained(folder), texts(2200))


def test_clip_equals_transformers() -> None:
    """Literal special tokens too: capitals become the same characters, but not the same token."""
    folder = MODEL / "tokenizer"
    assert_same(text_encoder.CLIPTokenizer(folder),
                transformers.CLIPTokenizer.from_pretrained(folder), texts(2200))


@pytest.mark.parametrize("normalized", [True, False])
def test_clip_follows_the_settings_of_its_special_tokens(tmp_path: Path, normalized: bool) -> None:
    """`normalized` in tokenizer_config.json: is a token looked for before or after lower-casing?"""
    folder = shutil.copytree(MODEL / "tokenizer", tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for entry in settings["added_tokens_decoder"].values():
        entry["normalized"] = normalized
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_same(text_encoder.CLIPTokenizer(folder),
                transformers.CLIPTokenizer.from_pretrained(folder), texts(500))


@pytest.mark.parametrize("limit", [5, 77])
def test_length_is_the_one_that_the_folder_states(tmp_path: Path, limit: int) -> None:
    for name, ours, peer in (
            ("tokenizer", text_encoder.CLIPTokenizer, transformers.CLIPTokenizer),
            ("tokenizer_2", text_encoder.T5Tokenizer, transformers.T5TokenizerFast)):
        folder = shutil.copytree(MODEL / name, tmp_path / name)
        settings = (json.loads((folder / "tokenizer_config.json").read_text())
                    | {"model_max_length": limit})
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert_same(ours(folder), peer.from_pretrained(folder), texts(200))


def test_layout_of_the_ids() -> None:
    """T5 ends in </s> (1), padded with 0; CLIP is between two tokens, padded with the second."""
    t5 = text_encoder.T5Tokenizer(MODEL / "tokenizer_2")
    first = t5(["red"])[0].tolist()
    assert first.count(1) == 1 and set(first[first.index(1) + 1:]) == {0}
    assert t5([""])[0].tolist() == [1] + [0] * (t5.length - 1)
    assert t5(["red " * 500])[0, -1] == 1                # cut texts end properly too

    clip = text_encoder.CLIPTokenizer(MODEL / "tokenizer")
    vocab = json.loads((MODEL / "tokenizer" / "vocab.json").read_text())
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert clip([""])[0].tolist() == [start] + [end] * (clip.length - 1)
    assert clip(["red " * 500])[0, 0] == start and clip(["red " * 500])[0, -1] == end
    assert end == max(vocab.values())                    # what a CLIP with eos_token_id 2 looks for


def test_what_is_no_text_is_refused() -> None:
    """Bytes of a command line that are no UTF-8 reach Python as lone surrogates."""
    for tokenizer in (text_encoder.T5Tokenizer(MODEL / "tokenizer_2"),
                      text_encoder.CLIPTokenizer(MODEL / "tokenizer")):
        with pytest.raises(ValueError):
            tokenizer(["red", "caf\udce9"])


# ----------------------------------------------------------------------------------- broken folders

@pytest.mark.parametrize("name, kind, files", [
    ("tokenizer", text_encoder.CLIPTokenizer,
     ["tokenizer_config.json", "vocab.json", "merges.txt"]),
    ("tokenizer_2", text_encoder.T5Tokenizer, ["tokenizer_config.json", "tokenizer.json"])])
def test_missing_and_broken_files_are_named(tmp_path: Path, name: str, kind: type,
                                            files: list) -> None:
    for file in files:
        folder = shutil.copytree(MODEL / name, tmp_path / file)
        (folder / file).write_text("{ one two three")
        with pytest.raises(ValueError, match=file):
            kind(folder)
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=file):
            kind(folder)


@pytest.mark.parametrize("name, kind", [
    ("tokenizer", text_encoder.CLIPTokenizer), ("tokenizer_2", text_encoder.T5Tokenizer)])
@pytest.mark.parametrize("limit", [None, "77", 1, 10 ** 30])
def test_lengths_that_are_none_are_refused(tmp_path: Path, name: str, kind: type,
                                           limit: object) -> None:
    """transformers writes 1e30 for "no limit", which cannot be padded to."""
    folder = shutil.copytree(MODEL / name, tmp_path / name)
    settings = (json.loads((folder / "tokenizer_config.json").read_text())
                | {"model_max_length": limit})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="model_max_length"):
        kind(folder)


@pytest.mark.parametrize("token", ["bos_token", "eos_token", "pad_token"])
def test_clip_needs_its_special_tokens(tmp_path: Path, token: str) -> None:
    folder = shutil.copytree(MODEL / "tokenizer", tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {token: "<|nowhere|>"}))
    with pytest.raises(ValueError, match="nowhere"):
        text_encoder.CLIPTokenizer(folder)
    del settings[token]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"has no {token}"):
        text_encoder.CLIPTokenizer(folder)
