"""FLUX's two text encoders and their tokenizers: T5 for the tokens, CLIP for the pooled vector.

    txt    = T5(instruction)          # (B, T, T5's D)   one vector per token, padding included
    pooled = CLIP(instruction)        # (B, CLIP's D)    one vector per instruction

Key: B batch; T tokens; D width of the encoder at hand; N heads; d head size.
Parameter names are keys of the Hugging Face folder's text_encoder/ (CLIP) and text_encoder_2/ (T5).
Source: T5 1.1 (Raffel et al. 2020, arXiv 1910.10683), CLIP (Radford et al. 2021, arXiv 2103.00020).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from support.configs import read_json

# -------------------------------------------------------------------------------------- tokenizers


class Tokenizer:
    """Texts to ids, cut and padded to tokenizer_config.json's length. Raises: ValueError."""

    def __init__(self, model: tokenizers.Tokenizer, settings: dict, folder: Path, pad: str):
        self.model, self.length = model, settings.get("model_max_length")
        if not isinstance(self.length, int) or not 2 < self.length < 100_000:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: "
                             f"model_max_length should be a small number, found {self.length!r}")
        if model.token_to_id(pad) is None:
            raise ValueError(f"{folder}: the tokenizer has no {pad} to pad with")
        model.enable_truncation(self.length)
        model.enable_padding(length=self.length, pad_id=model.token_to_id(pad), pad_token=pad)

    def __call__(self, texts: list[str]) -> Tensor:
        """-> (B, length) int64. Raises: ValueError for lone surrogates, which are no UTF-8."""
        for text in texts:                               # the library raises a TypeError
            text.encode()
        return torch.tensor([encoding.ids for encoding in self.model.encode_batch(texts)])


class T5Tokenizer(Tokenizer):
    """Unigram pieces from tokenizer.json, </s> at the end, then padding."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        model = read_tokenizer(folder / "tokenizer.json", tokenizers.Tokenizer.from_file)
        super().__init__(model, settings, folder, "<pad>")


class CLIPTokenizer(Tokenizer):
    """Byte-level BPE from vocab.json and merges.txt, between a start and an end token, padded."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        whole = folder / "tokenizer.json"
        if whole.is_file() and not (folder / "vocab.json").is_file():        # by transformers 5
            model = read_tokenizer(whole, tokenizers.Tokenizer.from_file)
            super().__init__(model, settings, folder, token_text(settings, "pad_token", folder))
            return
        vocab = read_json(folder / "vocab.json")
        start, end, pad = (token_text(settings, name, folder)
                           for name in ("bos_token", "eos_token", "pad_token"))
        if not {start, end, pad} <= vocab.keys():
            raise ValueError(f"{folder}: vocab.json lacks one of {start}, {end}, {pad}")
        model = read_tokenizer(folder / "merges.txt", lambda file: clip_bpe(
            *models.BPE.read_file(str(folder / "vocab.json"), file), start, end))
        try:                                             # normalized: looked for in lower case
            normalized = {entry["content"]: entry.get("normalized", False)
                          for entry in settings.get("added_tokens_decoder", {}).values()}
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must hold "
                             "objects with a content") from None
        model.add_special_tokens([
            AddedToken(token, normalized=normalized.get(token, False), special=True)
            for token in (start, end)])
        super().__init__(model, settings, folder, pad)


def token_text(settings: dict, name: str, folder: Path) -> str:
    """How a special token is written. Raises: ValueError when the settings do not say."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: has no {name}")
    return token


def read_tokenizer(file: Path,
                   build: Callable[[str], tokenizers.Tokenizer]) -> tokenizers.Tokenizer:
    """Build a tokenizer from a file. Raises: FileNotFoundError, ValueError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return build(str(file))
    except Exception as error:                           # the library raises no narrower type
        raise ValueError(f"{file}: not a tokenizer ({error})") from None


def clip_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], start: str,
             end: str) -> tokenizers.Tokenizer:
    """CLIP's tokenizer: NFC, one space for many, lower case, its own splits, bytes, BPE, </w>."""
    model = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=end, end_of_word_suffix="</w>", fuse_unk=False))
    model.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    pattern = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
               r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.post_processor = processors.RobertaProcessing(  # start, text, end
        (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False)
    return model


# ---------------------------------------------------------------------------------------------- T5

@dataclass(frozen=True)
class T5Config:
    """The entries of text_encoder_2/config.json that the model depends on."""
    vocab_size: int
    d_model: int                                         # D
    d_kv: int                                            # d; N d need not equal D
    d_ff: int                                            # width inside the feed-forward layer
    num_layers: int
    num_heads: int                                       # N
    relative_attention_num_buckets: int = 32             # distances share biases by bucket
    relative_attention_max_distance: int = 128           # beyond it all share the last bucket
    layer_norm_epsilon: float = 1e-6


def bucket(distance: Tensor, buckets: int, longest: int) -> Tensor:
    """Positions (key - query) to rows of the bias table, (T, T): exact near, by logarithm far."""
    half = buckets // 2                                  # rows for keys before, and for those after
    exact = half // 2                                    # nearer ones have a row each
    size = distance.abs()
    far = exact + (torch.log(size.float().clamp(min=1) / exact) / math.log(longest / exact)
                   * (half - exact)).long()
    return torch.where(size < exact, size, far.clamp(max=half - 1)) + half * (distance > 0)


class T5Attention(nn.Module):
    """Every token attends to all, with a bias by distance."""

    def __init__(self, c: T5Config, has_bias: bool):
        super().__init__()
        inner = c.num_heads * c.d_kv
        self.heads = c.num_heads
        self.q, self.k, self.v = (nn.Linear(c.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(
                c.relative_attention_num_buckets, c.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:    # (B, T, D), (1, N, T, T) -> (B, T, D)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        # Quirk: scores are not divided by sqrt(d); T5 folds that into its initialisation.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)     # (B, N, T, d)
        return self.o(out.transpose(1, 2).flatten(2))


class T5FeedForward(nn.Module):
    """GELU (tanh) of one projection gates another."""

    def __init__(self, c: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wi_1 = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        wide = wide.float() if x.dtype == torch.float16 else wide            # wo is fp32 then
        return self.wo(wide).to(x.dtype)


class T5Block(nn.Module):
    """Attention and feed-forward, each after a norm and with a residual; names as in the file."""

    def __init__(self, c: T5Config, has_bias: bool):
        super().__init__()
        norms = [nn.RMSNorm(c.d_model, c.layer_norm_epsilon) for _ in range(2)]
        self.layer = nn.ModuleList([
            nn.ModuleDict({"SelfAttention": T5Attention(c, has_bias), "layer_norm": norms[0]}),
            nn.ModuleDict({"DenseReluDense": T5FeedForward(c), "layer_norm": norms[1]})])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        x = limit(x + attention["SelfAttention"](attention["layer_norm"](x), bias))
        return limit(x + feed_forward["DenseReluDense"](feed_forward["layer_norm"](x)))


def limit(x: Tensor) -> Tensor:
    """Keep fp16 finite, 1000 below its largest as transformers does; other types pass."""
    return x.clamp(-64504, 64504) if x.dtype == torch.float16 else x


class T5Encoder(nn.Module):
    """Tokens to one vector each."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = c = config
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = nn.ModuleDict({
            "block": nn.ModuleList(T5Block(c, has_bias=i == 0) for i in range(c.num_layers)),
            "final_layer_norm": nn.RMSNorm(c.d_model, c.layer_norm_epsilon)})

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> (B, T, D). Without a mask: padding attends and is attended to."""
        # Quirk: FLUX was trained so; masking the padding changes every picture.
        c = self.config
        positions = torch.arange(ids.shape[1], device=ids.device)            # (T,)
        buckets = bucket(positions[None] - positions[:, None], c.relative_attention_num_buckets,
                         c.relative_attention_max_distance)                  # (T, T)
        table = self.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias
        bias = table(buckets).permute(2, 0, 1)[None]     # (1, N, T, T), shared by all blocks
        x = self.shared(ids)                             # (B, T, D)
        for block in self.encoder["block"]:
            x = block(x, bias)                           # (B, T, D)
        return self.encoder["final_layer_norm"](x)       # (B, T, D)


# -------------------------------------------------------------------------------------------- CLIP

@dataclass(frozen=True)
class CLIPConfig:
    """The entries of text_encoder/config.json that the model depends on."""
    vocab_size: int
    hidden_size: int                                     # D
    intermediate_size: int                               # width inside the MLP
    num_hidden_layers: int
    num_attention_heads: int                             # N
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2                                # where the pooled vector is taken


class CLIPAttention(nn.Module):
    """Every token attends to itself and those before it."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.heads, D = c.num_attention_heads, c.hidden_size
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:              # (B, T, D) -> (B, T, D)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)        # (B, N, T, d)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class CLIPLayer(nn.Module):
    """Attention and MLP, each after a norm and with a residual."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.self_attn = CLIPAttention(c)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.hidden_size, c.intermediate_size),
                                  "fc2": nn.Linear(c.intermediate_size, c.hidden_size)})
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        wide = self.mlp["fc1"](self.layer_norm2(x))      # (B, T, intermediate_size)
        return x + self.mlp["fc2"](wide * torch.sigmoid(1.702 * wide))       # quick GELU


class CLIPEncoder(nn.Module):
    """Tokens to one vector per text."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = c = config
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(c.vocab_size, c.hidden_size),
                "position_embedding": nn.Embedding(c.max_position_embeddings, c.hidden_size)}),
            "encoder": nn.ModuleDict({
                "layers": nn.ModuleList(CLIPLayer(c) for _ in range(c.num_hidden_layers))}),
            "final_layer_norm": nn.LayerNorm(c.hidden_size, c.layer_norm_eps)})

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> pooled (B, D), after the final norm, at the first end token.

        Raises: ValueError for tokens without one.
        """
        table = self.text_model["embeddings"]
        x = table["token_embedding"](ids)                # (B, T, D)
        x = x + table["position_embedding"].weight[:ids.shape[1]]
        for layer in self.text_model["encoder"]["layers"]:
            x = layer(x)                                 # (B, T, D)
        x = self.text_model["final_layer_norm"](x)       # (B, T, D)
        # Quirk: the public file's eos_token_id is 2, a slip: the largest id marks the end.
        end = self.config.eos_token_id
        is_end = ids == (ids.amax(dim=1, keepdim=True) if end == 2 else end)         # (B, T)
        if not is_end.any(dim=1).all():
            raise ValueError(f"CLIP: a text has no end token {end}; is the tokenizer its own?")
        return x[torch.arange(len(x), device=x.device), is_end.int().argmax(dim=1)]  # (B, D)
