"""The embedded model's two tokenizers, made from the tiny world's own instructions.

tiny/pretrain.py asks for them first.
"""
import json
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from support.files import write_json
from text_encoder import T5Tokenizer, clip_bpe
from tiny import world

LENGTH = 28                                              # tokens; the longest instruction has 26


def texts(number: int) -> list[str]:
    """Instructions of all tasks."""
    rng = np.random.default_rng(2)
    return [world.tiny_sample(rng, task).instruction for _ in range(number // len(world.WORDINGS))
            for task in world.WORDINGS]


def make_tokenizers(out: Path) -> None:
    """Both vocabularies, in the public folder's form, from the tiny world's own instructions."""
    if (out / "tokenizer" / "tokenizer_config.json").is_file():
        return
    corpus = texts(14_000)
    pieces = make_t5_tokenizer(corpus, out / "tokenizer_2")
    vocab = make_clip_tokenizer(corpus, out / "tokenizer")
    lengths = T5Tokenizer(out / "tokenizer_2")(corpus).ne(0).sum(1)
    print(f"tokenizers: T5 {pieces} pieces, CLIP {vocab}; "
          f"longest instruction {lengths.max()} tokens")


def make_t5_tokenizer(corpus: list[str], folder: Path) -> int:
    """Sentencepiece's unigram pieces, and the same as tokenizer.json; -> how many."""
    once = sorted({word.strip(".,:") for text in corpus for word in text.split()})
    ascii_letters = "".join(chr(i) for i in range(33, 127))
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus + once * 20), model_prefix=str(folder / "spiece"),
        vocab_size=420, hard_vocab_limit=False, model_type="unigram", character_coverage=1.0,
        required_chars=ascii_letters, normalization_rule_name="identity",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    (folder / "spiece.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    extra = [f"<extra_id_{i}>" for i in range(100)]      # T5 counts these from its vocabulary's end
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(
        vocab + [(piece, 0.0) for piece in extra[::-1]], unk_id=2))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.WhitespaceSplit(),
        tokenizers.pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")])
    model.decoder = tokenizers.decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    model.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5Tokenizer", "model_max_length": LENGTH, "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100,
        "additional_special_tokens": extra})
    write_json(folder / "special_tokens_map.json", {
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "additional_special_tokens": extra})
    return len(pieces)


def make_clip_tokenizer(corpus: list[str], folder: Path) -> int:
    """Byte-level BPE, as vocab.json and merges.txt; -> how many entries."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    seed = {letter: i for i, letter in enumerate(letters + [letter + "</w>" for letter in letters])}
    start, end = "<|startoftext|>", "<|endoftext|>"
    model = clip_bpe(seed | {start: 512, end: 513}, [], start, end)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=512 + 250, initial_alphabet=letters,
                                             end_of_word_suffix="</w>", show_progress=False)
    model.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    vocab = seed | {left + right: 512 + i for i, (left, right) in enumerate(merges)}
    vocab |= {start: len(vocab), end: len(vocab) + 1}
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {str(vocab[token]): {"content": token, "lstrip": False, "normalized": token == start,
                                   "rstrip": False, "single_word": False, "special": True}
               for token in (start, end)}
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False, "added_tokens_decoder": special, "bos_token": start,
        "eos_token": end, "unk_token": end, "pad_token": end, "clean_up_tokenization_spaces": True,
        "do_lower_case": True, "errors": "replace", "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer"})
    write_json(folder / "special_tokens_map.json", {
        "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end})
    return len(vocab)
