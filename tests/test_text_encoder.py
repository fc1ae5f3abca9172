"""text_encoder.py against transformers: encoders on random weights, small and in fp32; tokenizers.

Texts are those that people write, and those that nobody should.
"""
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config as PeerT5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention as PeerT5Attention

import text_encoder
import weights
from helpers import assert_close, MODEL, randomize, TOLERANCE
from support.files import write_part

# ----------------------------------------------------------------------------------------------- T5

def small_t5(**changes: object) -> text_encoder.T5Encoder:
    """Matrices a little smaller than unit gain: scores are not divided by sqrt(d)."""
    config = dict(vocab_size=40, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4) | changes
    model = randomize(text_encoder.T5Encoder(text_encoder.T5Config(**config)), gain=0.7)
    model.shared.weight.data *= math.sqrt(24)
    table = model.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias
    table.weight.data *= 2                               # so that a wrong bucket shows
    return model


def t5_peer(model: text_encoder.T5Encoder) -> T5EncoderModel:
    config = PeerT5Config(**vars(model.config), feed_forward_proj="gated-gelu", dropout_rate=0.0,
                          is_encoder_decoder=False, use_cache=False)
    peer = T5EncoderModel(config)
    state = model.state_dict()
    peer.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]},
                         strict=True)
    return peer.eval().requires_grad_(False)


def t5_ids(length: int) -> Tensor:
    ids = torch.randint(2, 40, (2, length), generator=torch.Generator().manual_seed(length))
    ids[0, length // 2], ids[0, length // 2 + 1:] = 1, 0     # the first ends early and is padded
    return ids


@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_t5_equals_transformers(length: int) -> None:
    """Reference: no scale, one bias for all blocks, no mask. 200 tokens reach the last bucket."""
    model, ids = small_t5(), t5_ids(length)
    assert_close(model(ids), t5_peer(model)(ids).last_hidden_state)


def test_t5_equals_transformers_at_other_shapes() -> None:
    model = small_t5(num_heads=2, d_kv=6, relative_attention_num_buckets=16,
                     relative_attention_max_distance=40, layer_norm_epsilon=0.05)
    ids = t5_ids(90)
    assert_close(model(ids), t5_peer(model)(ids).last_hidden_state)


def test_t5_lets_padding_attend() -> None:
    """Reference: as the pipeline, which passes no mask. With one, the words' own vectors change."""
    model, ids = small_t5(), t5_ids(20)
    peer = t5_peer(model)
    words = slice(0, 10)
    masked = peer(ids, attention_mask=(ids > 0).long()).last_hidden_state
    assert (model(ids) - masked)[0, words].abs().max() > 1e-2
    assert_close(model(ids)[0, words], peer(ids).last_hidden_state[0, words])


def test_buckets_are_known_and_equal_transformers() -> None:
    known = {0: 0, 8: 24, -16: 10, 64: 30, 91: 31, -91: 15,
             1: 17, -1: 1, 7: 23, -8: 8, 5000: 31, -5000: 15}
    assert text_encoder.bucket(torch.tensor(list(known)), 32, 128).tolist() == list(known.values())
    distance = torch.arange(-600, 601)
    for buckets, longest in ((32, 128), (16, 40)):
        peer = PeerT5Attention._relative_position_bucket(distance, True, buckets, longest)
        assert torch.equal(text_encoder.bucket(distance, buckets, longest), peer)


def test_t5_stays_finite_in_fp16(tmp_path: Path) -> None:
    """The second feed-forward matrix stays fp32, sums are clamped: no infinity where fp16 ends."""
    model = small_t5()
    for block in model.encoder["block"]:
        block.layer[1]["DenseReluDense"].wo.weight.data *= 1e5
    write_part(model.state_dict(), vars(model.config), tmp_path, "model.safetensors",
                         torch.float32)
    half = weights.load("text_encoder_2", tmp_path, dtype=torch.float16)
    assert {p.dtype for name, p in half.named_parameters()
            if name.endswith("wo.weight")} == {torch.float32}
    assert {p.dtype for name, p in half.named_parameters()
            if not name.endswith("wo.weight")} == {torch.float16}
    out = half(t5_ids(12))
    assert out.dtype == torch.float16 and out.isfinite().all()


# --------------------------------------------------------------------------------------------- CLIP

def small_clip(eos: int, eps: float = 1e-5) -> text_encoder.CLIPEncoder:
    return randomize(text_encoder.CLIPEncoder(text_encoder.CLIPConfig(
        vocab_size=50, hidden_size=24, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=16, eos_token_id=eos, layer_norm_eps=eps)))


def clip_peer(model: text_encoder.CLIPEncoder) -> CLIPTextModel:
    peer = CLIPTextModel(CLIPTextConfig(**vars(model.config), hidden_act="quick_gelu",
                                        attention_dropout=0.0, bos_token_id=0, pad_token_id=1))
    state = model.state_dict()
    if not any(name.startswith("text_model.") for name in peer.state_dict()):  # newer ones drop it
        state = {name.removeprefix("text_model."): p for name, p in state.items()}
    peer.load_state_dict(state, strict=True)
    return peer.eval().requires_grad_(False)


def clip_ids(end: int, length: int) -> Tensor:
    ids = torch.randint(3, 40, (3, length), generator=torch.Generator().manual_seed(length))
    for row, at in enumerate((length // 2, length - 1, 1)):
        ids[row, at:] = end                              # end tokens as padding: the first counts
    return ids


@pytest.mark.parametrize("eos, end", [(2, 49), (49, 49), (20, 20)])
@pytest.mark.parametrize("length, eps", [(3, 1e-5), (16, 1e-5), (16, 0.05)])
def test_clip_equals_transformers(eos: int, end: int, length: int, eps: float) -> None:
    """Reference: with eos_token_id 2, as published, the largest id marks the end; else that id."""
    model, ids = small_clip(eos, eps), clip_ids(end, length)
    assert_close(model(ids), clip_peer(model)(ids).pooler_output)


def test_clip_refuses_tokens_without_an_end() -> None:
    """As another model's tokenizer may give; the start token's vector would be the same for all."""
    model, ids = small_clip(20), clip_ids(20, 12)
    ids[1][ids[1] == 20] = 21
    with pytest.raises(ValueError, match="no end token 20"):
        model(ids)


def test_clip_pools_at_the_first_end_token() -> None:
    """Attention is causal: what follows the end token changes nothing, what precedes it does."""
    for eos in (2, 49):
        model, ids = small_clip(eos), clip_ids(49, 12)[:1]
        after, before = ids.clone(), ids.clone()
        after[0, 8:], before[0, 2] = 5, 1
        assert (model(ids) - model(after)).abs().max() <= TOLERANCE
        assert (model(ids) - model(before)).abs().max() > 1e-2


# --------------------------------------------------------------------------------------- tokenizers

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


def assert_same_ids(ours: object, peer: object, lines: list[str]) -> None:
    padded = peer(lines, padding="max_length", truncation=True, max_length=peer.model_max_length)
    found, expected = ours(lines), torch.tensor(padded.input_ids)
    assert found.shape == expected.shape == (len(lines), ours.length) and found.dtype == torch.int64
    wrong = (found != expected).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} differ, shortest: {min((lines[i] for i in wrong), key=len)!r}"


def test_t5_tokens_equal_transformers() -> None:
    folder = MODEL / "tokenizer_2"
    assert_same_ids(text_encoder.T5Tokenizer(folder),
                    transformers.T5TokenizerFast.from_pretrained(folder), texts(2200))


def test_clip_tokens_equal_transformers() -> None:
    """Literal special tokens too: capitals become the same characters, but not the same token."""
    folder = MODEL / "tokenizer"
    assert_same_ids(text_encoder.CLIPTokenizer(folder),
                    transformers.CLIPTokenizer.from_pretrained(folder), texts(2200))


@pytest.mark.parametrize("normalized", [True, False])
def test_clip_follows_the_settings_of_its_special_tokens(tmp_path: Path, normalized: bool) -> None:
    """`normalized` in tokenizer_config.json: is a token looked for before or after lower-casing?"""
    folder = shutil.copytree(MODEL / "tokenizer", tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for entry in settings["added_tokens_decoder"].values():
        entry["normalized"] = normalized
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_same_ids(text_encoder.CLIPTokenizer(folder),
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
        assert_same_ids(ours(folder), peer.from_pretrained(folder), texts(200))


def test_a_clip_tokenizer_in_one_file_is_read_too(tmp_path: Path) -> None:
    """As transformers 5 saves it: without vocab.json and merges.txt."""
    transformers.CLIPTokenizer.from_pretrained(MODEL / "tokenizer").save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    several, one = map(text_encoder.CLIPTokenizer, (MODEL / "tokenizer", tmp_path))
    lines = [*texts(200), "", "red " * 500]
    assert torch.equal(several(lines), one(lines))


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


@pytest.mark.parametrize("entries", [[], None, {"1": "x"}, {"1": {}}])
def test_special_tokens_that_are_not_described_are_refused(tmp_path, entries):
    folder = tmp_path / "tokenizer"
    shutil.copytree(MODEL / "tokenizer", folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": entries}))
    with pytest.raises(ValueError, match="added_tokens_decoder"):
        text_encoder.CLIPTokenizer(folder)


def test_a_tokenizer_without_its_padding_is_refused(tmp_path):
    folder = tmp_path / "tokenizer_2"
    shutil.copytree(MODEL / "tokenizer_2", folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<pad>", "<gap>"))
    with pytest.raises(ValueError, match="<pad>"):
        text_encoder.T5Tokenizer(folder)
