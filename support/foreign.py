"""What stands where weights should: each named as what it is, with the way out.

support/files.py asks before it reads a file, weights.load() and support/layouts.py of the names in
one, and all that open what a user has named, when there is nothing.
"""
import re
from collections.abc import Iterable
from pathlib import Path

AGAIN = "download it again"
SAFE = "take the .safetensors of this model"
LFS = ("is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or fetch "
       "it with `hf download`")
TEXTS = {  # how a file begins (spaces left out), and what it then is, where JSON should be too
    rb"version https://git-lfs\.github\.com|version https://hawser": LFS,
    rb"<(!doctype|html|head|\?xml|!--)": "is a web page, not weights: log in and agree to the "
    f"licence where its page asks for it, then {AGAIN}"}
STARTS = TEXTS | {  # or weights
    rb'\{\s*"|\[|Entry not found|Invalid (user|cred)|Access to|Repository not|Unauthorized|'
    rb"Not Found": f"is text, perhaps a server's answer or a configuration, not weights: "
    f"name its folder, or {AGAIN}",
    rb"GGUF": f"GGUF is not read; {SAFE}",
    rb"PK\x03\x04|\x80[\x02-\x05]": "is a pickle (.bin, .pt, .ckpt) or a zip archive; a pickle may "
    f"hold code and is not read: {SAFE}",
    rb"\x1f\x8b|Rar!|7z\xbc|BZh|\xfd7zXZ": "is an archive; unpack it",
    rb"\x89HDF": f"is HDF5 (Keras), which is not read; {SAFE}",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF(?s:....)WEBP|BM|II\*\0|MM\0\*": "is a picture, not weights"}
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")
QUANTISED = {  # ends of tensors' names that a quantisation adds, and whose they are
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB|weight_format)":
        "bitsandbytes (nf4, int8)",
    r"\.(qweight|wscales|wzeros|wtscale|wcscales|smooth|smooth_orig|smooth_factor\w*|proj_down"
    r"|proj_up)": "nunchaku (SVDQuant) or GPTQ, AWQ",
    r"\.(qzeros|g_idx)": "GPTQ or AWQ",
    r"\.weight\._(data|scale|shift|packed)|\.weight_qtype": "quanto",
    r"\.weight_scale_inv": "fp8 in blocks",
    r"\.(weight_scale_2|weight_global_scale|weight_packed)": "nvfp4 or compressed-tensors",
    r"\.(scales|biases)": "MLX"}


def start_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(512)


def is_header(start: bytes) -> bool:
    """Whether a safetensors file may begin so: the header's length in 8 bytes, then its JSON."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000


def check_weights(file: Path) -> None:
    """Raises: ValueError for a file that is no safetensors file, saying what it is."""
    start = start_of(file)
    if file.suffix in UNFINISHED:
        raise ValueError(f"{file}: is an unfinished download; let it end, or {AGAIN}")
    if not start.strip(b"\0"):
        raise ValueError(f"{file}: not a whole safetensors file (empty, or begins with zeros: the "
                         f"download did not end); {AGAIN}")
    if not is_header(start):
        check_start(start, file, STARTS)
        if is_text(start):
            raise ValueError(f"{file}: is text, not weights")


def is_text(start: bytes) -> bool:
    """Whether a file begins with letters and nothing else, in UTF-8; a last one may be cut."""
    text = start.decode(errors="ignore")
    return len(text.encode()) > len(start) - 4 and all(
        letter.isprintable() or letter in "\t\r\n" for letter in text)


def check_text(start: bytes, file: Path) -> None:
    """Raises: ValueError for a Git LFS pointer or a web page where a small file should be."""
    check_start(start, file, TEXTS)


def check_start(start: bytes, file: Path, kinds: dict[bytes, str]) -> None:
    for pattern, told in kinds.items():
        if re.match(pattern, start.removeprefix(b"\xef\xbb\xbf").lstrip(), re.IGNORECASE):
            raise ValueError(f"{file}: {told}")


def check_quantised(names: Iterable[str], where: object) -> None:
    """Raises: ValueError when tensors' names are a quantisation's other than scaled fp8."""
    names = list(names)
    for pattern, whose in QUANTISED.items():
        found = [name for name in names if re.search(f"{pattern}$", name)]
        if found:
            raise ValueError(f"{where}: is quantised by {whose}, as {found[0]} shows, which is not "
                             "read; take a bf16 or an fp8 file of this model")


def check_there(path: Path, option: str = "") -> None:
    """Raises: FileNotFoundError, which begins with the option that names the path."""
    if not path.exists():
        raise FileNotFoundError(f"{option} {path}: {nothing_at(path)}".lstrip())


def nothing_at(path: Path) -> str:
    """What to say where there is nothing: a repository's name is not yet a folder."""
    part = next((path.with_name(path.name + end) for end in UNFINISHED
                 if path.with_name(path.name + end).is_file()), None)
    if part:
        return f"no such file, but {part.name}, an unfinished download; let it end, or {AGAIN}"
    name = re.fullmatch(r"(?:https?:/+)?(?:huggingface\.co/|hf\.co/)?([\w.-]+/([\w.-]+?))/?"
                        r"(/(tree|blob|resolve)/.*)?", path.as_posix())
    if path.is_symlink():
        return f"is a link to {path.readlink()}, which is not there; {AGAIN}"
    if any(f'"{path.name}"' in index.read_text(errors="replace")
           for index in path.parent.glob("*.safetensors.index*.json")):
        return ("no such file, though the index beside it names it; the same `hf download` again "
                "fetches what is missing")
    if name and not path.parent.exists() and path.suffix != ".safetensors":
        return ("no such file or folder; if it is a repository at Hugging Face, fetch it first, "
                f"hf download {name[1]} --local-dir {name[2]}, then name the folder {name[2]}")
    return "no such file or folder"


def found_instead(folder: Path) -> str:
    """What a folder without safetensors files holds in their place, in brackets, or nothing."""
    fetched = (folder / ".cache").rglob("*")             # where `hf download` keeps what it has
    others = [file.name for file in sorted([*folder.glob("*"), *fetched])
              if file.suffix in (*UNFINISHED, ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack")]
    if not others:
        return ""
    unfinished = any(other.endswith(UNFINISHED) for other in others)
    return (f" ({others[0]} is " + ("an unfinished download; run `hf download` again)" if unfinished
                                    else f"not read; {SAFE})"))


def snapshot(path: Path) -> Path:
    """The files of a repository's folder in Hugging Face's cache; any other path is itself."""
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    main = snapshots.parent / "refs/main"
    if not snapshots.is_dir() or (path / "model_index.json").is_file():
        return path
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        return snapshots / main.read_text().strip()
    every = sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime)
    return every[-1] if every else path
