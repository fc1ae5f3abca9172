"""Checkpoints: whole ones load unchanged and uncopied, others are refused, by name, in one line."""
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dit
import text_encoder
import vae
import weights
from support import commands
from support.describe import describe
from support.files import config_from, read_json, read_metadata, read_tensors, replacing, write_part

ROOT = Path(weights.__file__).parent
VAE = dict(block_out_channels=[8, 16], layers_per_block=1, latent_channels=4, norm_num_groups=4,
           scaling_factor=0.3611, shift_factor=0.1159)
T5 = dict(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
CLIP = dict(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2)
DIT = dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
           num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
           axes_dims_rope=[4, 6, 6], guidance_embeds=True)
PARTS = {"vae": (VAE, vae.VAEConfig, vae.AutoEncoder, partial(weights.load, "vae")),
         "transformer": (DIT, dit.DiTConfig, dit.FluxTransformer,
                         partial(weights.load, "transformer")),
         "text_encoder": (CLIP, text_encoder.CLIPConfig, text_encoder.CLIPEncoder,
                          partial(weights.load, "text_encoder")),
         "text_encoder_2": (T5, text_encoder.T5Config, text_encoder.T5Encoder,
                            partial(weights.load, "text_encoder_2"))}


def tensors_of(part: str) -> dict[str, Tensor]:
    config, kind, model, _ = PARTS[part]
    torch.manual_seed(0)
    return model(config_from(kind, config, part)).state_dict()


def write(folder: Path, part: str, change: Callable[[dict], object] = lambda tensors: None) -> Path:
    """One component as published, in a single file, after `change` had its way with its tensors."""
    tensors = tensors_of(part)
    change(tensors)
    write_part(tensors, PARTS[part][0], folder, "model.safetensors", torch.float32)
    return folder


def load(folder: Path, part: str) -> nn.Module:
    return PARTS[part][3](folder)


def assert_same(model: nn.Module, part: str) -> None:
    found, expected = model.state_dict(), tensors_of(part)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def shard(folder: Path, part: str = "vae") -> dict[str, str]:
    """The same component in two files and an index. -> its weight_map."""
    tensors = tensors_of(part)
    names = sorted(tensors)
    weight_map = {}
    for i, half in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        write_part({name: tensors[name] for name in half}, PARTS[part][0], folder,
                             file, torch.float32)
        weight_map |= dict.fromkeys(half, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def raw_file(path: Path, header: object, body: bytes = b"") -> Path:
    """A safetensors file with any header: its length in 8 bytes, JSON, then the tensors' bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)
    return path


# ------------------------------------------------------------------------------------------ whole

@pytest.mark.parametrize("part", PARTS)
def test_round_trip(tmp_path: Path, part: str) -> None:
    model = load(write(tmp_path, part), part)
    assert_same(model, part)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("part", PARTS)
def test_round_trip_of_shards(tmp_path: Path, part: str) -> None:
    shard(tmp_path, part)
    assert_same(load(tmp_path, part), part)


def test_other_dtypes(tmp_path: Path) -> None:
    write_part(tensors_of("vae"), VAE, tmp_path, "model.safetensors", torch.bfloat16)
    model = weights.load("vae", tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}         # the file's
    assert {p.dtype for p in
            weights.load("vae", tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_metadata(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"rank": "4"})
    assert read_metadata(tmp_path / "a.safetensors") == {"rank": "4"}
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "b.safetensors") == {}


@dataclass
class NoConfig:
    pass


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(50, 1_000_000))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory use from /proc")
def test_loading_on_the_cpu_copies_nothing(tmp_path: Path, monkeypatch) -> None:
    """A sparse file of 200 MB: a copy would cost as much, the map only the pages touched."""
    header = {"weight": {"dtype": "F32", "shape": [50, 1_000_000],
                         "data_offsets": [0, 200_000_000]}}
    with raw_file(tmp_path / "model.safetensors", header).open("r+b") as file:
        file.truncate(file.seek(0, 2) + 200_000_000)
    (tmp_path / "config.json").write_text("{}")
    before = resident_bytes()
    monkeypatch.setitem(weights.PARTS, "vae", weights.Part(lambda config: Wide(), NoConfig, dict))
    model = weights.load("vae", tmp_path)
    assert resident_bytes() - before < 20_000_000
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert model.weight.shape == (50, 1_000_000) and model.weight[49, -1] == 0


# ---------------------------------------------------------------- what other tools write into files

@pytest.mark.parametrize("kept", [("shared.weight",), ("encoder.embed_tokens.weight",),
                                  ("shared.weight", "encoder.embed_tokens.weight")])
def test_t5_embedding_under_either_name(tmp_path: Path, kept: tuple) -> None:
    def change(tensors: dict) -> None:
        embedding = tensors.pop("shared.weight")
        tensors.update({name: embedding.clone() for name in kept})
    assert_same(load(write(tmp_path, "text_encoder_2", change), "text_encoder_2"), "text_encoder_2")


def test_t5_without_an_embedding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing: shared\.weight"):
        load(write(tmp_path, "text_encoder_2", lambda tensors: tensors.pop("shared.weight")),
             "text_encoder_2")


def test_clip_with_more_than_the_text_encoder(tmp_path: Path) -> None:
    folder = write(tmp_path, "text_encoder")
    more = {"text_model.embeddings.position_ids": torch.arange(77)[None],
            "text_projection.weight": torch.zeros(2, 2), "logit_scale": torch.tensor(4.6),
            "vision_model.post_layernorm.weight": torch.zeros(2),
            "visual_projection.weight": torch.zeros(2, 2)}
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors")
    assert_same(load(folder, "text_encoder"), "text_encoder")


def test_clip_without_prefix(tmp_path: Path) -> None:
    def change(tensors: dict) -> None:
        bare = {name.removeprefix("text_model."): t for name, t in tensors.items()}
        tensors.clear()
        tensors.update(bare)
    assert_same(load(write(tmp_path, "text_encoder", change), "text_encoder"), "text_encoder")


# ------------------------------------------------------------------------------------ names, shapes

@pytest.mark.parametrize("part, name", [
    ("vae", "decoder.up_blocks.0.resnets.1.conv2.bias"),
    ("transformer", "single_transformer_blocks.0.attn.norm_q.weight"),
    ("text_encoder", "text_model.final_layer_norm.bias"),
    ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")])
def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path, part: str,
                                                            name: str) -> None:
    shape = tuple(tensors_of(part)[name].shape)
    prefix = "text_model." if part == "text_encoder" else ""                 # added where absent
    changes = {f"1 missing: {name}": lambda t: t.pop(name),
               f"1 unexpected: {prefix}surplus": lambda t: t.update(surplus=torch.zeros(1)),
               f"1 of another shape: {name} (7, 3) instead of {shape}":
                   lambda t: t.update({name: torch.zeros(7, 3)}),
               f"1 of another shape: {name} {shape + (1,)} instead":
                   lambda t: t.update({name: t[name][..., None]})}
    for i, (message, change) in enumerate(changes.items()):
        folder = write(tmp_path / str(i), part, change)
        with pytest.raises(ValueError, match=re.escape(str(folder)) + ".*" + re.escape(message)):
            load(folder, part)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    def change(tensors: dict) -> None:
        for name in [name for name in tensors if name.startswith("encoder.mid_block.attentions")]:
            tensors["ema." + name] = tensors.pop(name)
        tensors["decoder.conv_in.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, "vae", change), "vae")
    for part in ("10 missing: encoder.mid_block", "10 unexpected: ema.", "and 7 more",
                 "(5,) instead of (16,)"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_tensors_that_are_no_floating_point_numbers_are_named(tmp_path: Path,
                                                              dtype: torch.dtype) -> None:
    folder = write(tmp_path, "vae")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.bias"):
        load(folder, "vae")


# ----------------------------------------------------------------------------------- files, folders

def test_what_is_absent_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "vae", "vae")
    with pytest.raises(FileNotFoundError, match="nowhere.*no such file"):
        load(tmp_path / "nowhere", "vae")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        load(folder, "vae")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="found 0 files"):
        load(folder, "vae")
    for read in (lambda file: read_tensors([file]), read_metadata,
                 read_json, partial(describe, load=weights.load)):
        with pytest.raises(FileNotFoundError, match="gone: no such file"):
            read(tmp_path / "gone")


def test_two_files_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "vae")
    (folder / "model.fp16.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(FileNotFoundError, match="found 2 files"):
        load(folder, "vae")


ONE = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
BROKEN = {
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(bytes(range(256)) * 8),
    "text":
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "no JSON": lambda file: raw_file(file, b"{nope"),
    "header longer than the file":
        lambda file: file.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
    "bytes missing": lambda file: raw_file(file, ONE, bytes(8)),
    "bytes to spare": lambda file: raw_file(file, ONE, bytes(24)),
    "shape larger than its bytes":
        lambda file: raw_file(file, {"a": ONE["a"] | {"shape": [5]}}, bytes(16)),
    "negative shape": lambda file: raw_file(file, {"a": ONE["a"] | {"shape": [-4]}}, bytes(16)),
    "shape that overflows":
        lambda file: raw_file(file, {"a": ONE["a"] | {"shape": [2 ** 40, 2 ** 40]}}, bytes(16)),
    "bytes before the first":
        lambda file: raw_file(file, {"a": ONE["a"] | {"data_offsets": [4, 20]}}, bytes(20)),
    "bytes used twice": lambda file: raw_file(file, {"a": ONE["a"], "b": ONE["a"]}, bytes(16)),
    "unknown dtype": lambda file: raw_file(file, {"a": ONE["a"] | {"dtype": "Q4"}}, bytes(16)),
    "unreadable dtype":
        lambda file: raw_file(file, {"a": ONE["a"] | {"dtype": "F6_E2M3", "shape": [16]}},
                              bytes(12)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.safetensors"
    BROKEN[kind](file)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        read_tensors([file])


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9999])
def test_truncated_files_are_named(tmp_path: Path, share: float) -> None:
    file = write(tmp_path, "vae") / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:int(share * len(data))])
    for read in (lambda: load(tmp_path, "vae"), lambda: read_metadata(file)):
        with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
            read()


@pytest.mark.parametrize("outside", ["../other.safetensors", "/other.safetensors",
                                     "sub/other.safetensors", "..", "", "config.json"])
def test_index_that_names_other_files_is_refused(tmp_path: Path, outside: str) -> None:
    weight_map = shard(tmp_path / "vae")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    write_index(tmp_path / "vae", weight_map | {"decoder.conv_in.bias": outside})
    with pytest.raises(ValueError, match="files of the same folder"):
        load(tmp_path / "vae", "vae")


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {"a": 3}, {"a": None}])
def test_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    shard(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match=r"index\.json: weight_map"):
        load(tmp_path, "vae")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors: no such file"):
        load(tmp_path, "vae")


def test_index_that_forgets_a_shard_leaves_tensors_missing(tmp_path: Path) -> None:
    weight_map = shard(tmp_path)
    write_index(tmp_path, {name: file for name, file in weight_map.items() if "00001" in file})
    with pytest.raises(ValueError, match="missing"):
        load(tmp_path, "vae")


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shard(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"decoder.conv_in.bias": torch.zeros(16)}, second)
    with pytest.raises(ValueError, match=r"00002.*decoder\.conv_in\.bias occurs in another shard"):
        load(tmp_path, "vae")


# -------------------------------------------------------------------------------------- config.json

@pytest.mark.parametrize("part", PARTS)
def test_missing_config_entries_are_named(tmp_path: Path, part: str) -> None:
    folder = write(tmp_path, part)
    needed = [name for name in PARTS[part][0] if name != "guidance_embeds"]
    for name in needed:
        (folder / "config.json").write_text(json.dumps(
            {k: v for k, v in PARTS[part][0].items() if k != name}))
        with pytest.raises(ValueError, match=rf"config\.json: has no entry '{name}'"):
            load(folder, part)


@pytest.mark.parametrize("entry, value", [
    ("layers_per_block", "1"), ("layers_per_block", 1.5), ("layers_per_block", None),
    ("layers_per_block", True), ("block_out_channels", 8), ("block_out_channels", "8"),
    ("block_out_channels", ["8", "16"]), ("block_out_channels", []),
    ("block_out_channels", [8.0, 16.0]), ("block_out_channels", [8, 0]),
    ("scaling_factor", "0.3611"), ("scaling_factor", []), ("latent_channels", -4)])
def test_config_entries_of_another_kind_are_named(tmp_path: Path, entry: str,
                                                  value: object) -> None:
    folder = write(tmp_path, "vae")
    (folder / "config.json").write_text(json.dumps(VAE | {entry: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {entry} should be"):
        load(folder, "vae")


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_must_divide_the_widths(tmp_path: Path, groups: int) -> None:
    folder = write(tmp_path, "vae")
    (folder / "config.json").write_text(json.dumps(VAE | {"norm_num_groups": groups}))
    with pytest.raises(ValueError, match=f"norm_num_groups {groups}"):
        load(folder, "vae")


def test_guidance_must_be_true_or_false(tmp_path: Path) -> None:
    folder = write(tmp_path, "transformer")
    (folder / "config.json").write_text(json.dumps(DIT | {"guidance_embeds": 1}))
    with pytest.raises(ValueError, match="guidance_embeds should be bool, found 1"):
        load(folder, "transformer")


def test_config_may_hold_whole_numbers_for_floats_and_other_entries(tmp_path: Path) -> None:
    folder = write(tmp_path, "vae")
    (folder / "config.json").write_text(json.dumps(
        VAE | {"scaling_factor": 1, "_class_name": "AutoencoderKL"}))
    assert load(folder, "vae").config.scaling_factor == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"null", b"\xff\xfe{}", b"{'a': 1}",
                                     b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_config_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path, "vae")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|expected a JSON object)"):
        load(folder, "vae")


# ----------------------------------------------------------------------------------------- command

def command(path: Path) -> subprocess.CompletedProcess:
    call = [sys.executable, "weights.py", str(path)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_command_describes_a_folder_and_a_file(tmp_path: Path) -> None:
    for part in PARTS:
        write(tmp_path / part, part)
    done = command(tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[4:] == [f"{tmp_path}: without tokenizer", f"{tmp_path}: without tokenizer_2",
                         f"{tmp_path}: not whole"]
    for part in ("tokenizer", "tokenizer_2"):
        (tmp_path / part).mkdir()
    assert describe(tmp_path, weights.load).endswith(": not whole")    # they are empty
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(ROOT / "tiny/model" / part, tmp_path / part, dirs_exist_ok=True)
    assert describe(tmp_path, weights.load).splitlines()[6:] == [
        f"{tmp_path}: whole", f"python sample.py --instruction TEXT --model {tmp_path}"]
    file = tmp_path / "vae" / next(iter((tmp_path / "vae").glob("*.safetensors"))).name
    file.rename(file.with_suffix(".gone"))               # as a broken download leaves it
    told = describe(tmp_path, weights.load).splitlines()
    assert len(told) == 8 and "vae: expected one .safetensors" in told[6]
    assert told[7] == f"{tmp_path}: not whole"
    file.with_suffix(".gone").rename(file)
    tensors = tensors_of("vae")
    expected = (f"{len(tensors)} tensors, "
                f"{sum(t.numel() for t in tensors.values()):,} parameters, float32")
    assert [line for line in lines if line.endswith(f"vae: vae, Hugging Face, {expected}")]
    alone = describe(tmp_path / "vae", weights.load).splitlines()
    assert alone[0].endswith(expected) and alone[1].endswith("vae: whole")
    assert f"--model ... --vae {tmp_path / 'vae'} --clip ... --t5 ... --tokenizers" in alone[2]


@pytest.mark.parametrize("kind", ["missing path", "truncated file"])
def test_command_fails_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "truncated file":
        raw_file(path, ONE, bytes(8))
    done = command(path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_run_prints_messages_of_many_lines_as_one(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("one\n  two")
    with pytest.raises(SystemExit) as stop:
        commands.run(fail)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: one two\n"


@pytest.mark.parametrize("error, code, words", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 2, "not enough memory"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_run_says_why_it_ends(capsys: pytest.CaptureFixture, error: BaseException, code: int,
                              words: str) -> None:
    def fail() -> None:
        raise error
    with pytest.raises(SystemExit) as stop:
        commands.run(fail)
    err = capsys.readouterr().err
    assert stop.value.code == code and words in err and len(err.strip().splitlines()) == 1


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """By the name that was asked for, not by the one that it is written to first."""
    file = tmp_path / "gone" / "a.txt"
    with pytest.raises(OSError, match="a.txt: cannot be written .No such file or directory"):
        with replacing(file) as aside:
            aside.write_text("a")
    with pytest.raises(OSError, match="^[^:]*b.txt: cannot be written .No space left on device.$"):
        with replacing(tmp_path / "a.txt"), replacing(tmp_path / "b.txt"):
            raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_run_leaves_our_own_mistakes_alone() -> None:
    def fail() -> None:
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        commands.run(fail)


def test_folder_without_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no FLUX Kontext folder"):
        describe(tmp_path, weights.load)
