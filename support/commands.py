"""How a command reads an argument and how it ends: in one line where its user was wrong.

The commands at the top call loading() before what takes seconds to import; all end with run(main);
support/options.py declares the options, of the types here.
"""
import argparse
import errno
import io
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


def loading() -> None:
    """Have Ctrl-C end the process in one line while its modules are loaded, as run() does later."""
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, trace)
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(130)                                    # half of the modules are there
    sys.excepthook = hook


class Lasting(io.FileIO):
    """A file that takes what is written to it though it gets lost (`| head`, a full disk)."""

    def write(self, content: bytes) -> int:
        try:
            return super().write(content)
        except OSError as error:                         # nobody reads; or there is no room
            if error.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            return len(content)


def lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """A stream of this process that never ends its work: letters it does not know are escaped."""
    raw = Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace",
                            line_buffering=stream.line_buffering)


def rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", 0)) if workers() > 1 else 0


def workers() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that speaks for all."""
    return rank() == 0


def run(command: Callable[[], None]) -> None:
    """Run a command; what its user can get wrong is printed as one line, with exit code 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):      # a test's, ...
            continue
        if stream.isatty():                              # which on Windows must stay what it is
            stream.reconfigure(errors="backslashreplace")
        else:
            setattr(sys, name, lasting(stream))
    try:
        command()
    except (ValueError, OSError) as error:
        print(end="", flush=True)                        # what was said before comes first
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:         # torch says so in many ways
        told = f"MemoryError {error}" if isinstance(error, MemoryError) else str(error)
        if not re.search("MemoryError|out of memory|can't allocate|cannot allocate", told, re.I):
            raise
        print(f"error: not enough memory ({told.splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def path(text: str) -> Path:
    """An option's type. Empty, as a variable that is not set, it would name the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder, or leave it out")
    return Path(text)


class Once(argparse.Action):
    """Keeps an option's value. A second value would take the first's place unsaid: an error."""

    def __call__(self, parser: "Parser", namespace: argparse.Namespace, values: object,
                 option: str | None = None) -> None:
        if self.dest in parser.given:
            many = self.nargs == "+"
            more = "write all its values after one" if many else "but it holds one value"
            raise ValueError(f"{option or self.dest}: given twice, {more}")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse, but what is wrong is a ValueError, which run() says in one line."""

    def __init__(self, **about: object):
        super().__init__(**about)
        self.given: set[str] = set()                     # where values have been put
        for name in (None, "store"):
            self.register("action", name, Once)
        self.register("type", Path, path)                # what add_argument(type=Path) means here

    def error(self, message: str) -> None:
        raise ValueError(re.sub("^argument ([^:]+): ", r"\1 ", message))


def checked(kind: type, fits: Callable[[object], bool], told: str) -> Callable[[str], object]:
    """An option's type: a value of that kind that fits, else an error that says `told`."""
    def value_of(text: str) -> object:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text}: {told}")
        return value
    value_of.__name__ = kind.__name__                    # for argparse's own words
    return value_of


STEPS = checked(int, lambda n: 1 <= n <= 10_000, "must be from 1 to 10,000")
GUIDANCE = checked(float, lambda g: 0 <= g <= 100, "must be from 0 to 100; 2.5 is usual")
COUNT = checked(int, lambda n: n > 0, "must be positive")
POSITIVE = checked(float, lambda x: 0 < x < math.inf, "must be positive")
STRENGTH = checked(float, lambda x: 0 < x <= 100, "must be above 0, at most 100; 1 is as trained")
NOT_NEGATIVE = checked(float, lambda x: 0 <= x < math.inf, "must be a number from 0 up")
FOLDER = checked(path, Path.is_dir, "no such folder")
ANSWERS = checked(path, Path.exists, "no such file or folder")


def may_hold(folder: Path) -> bool:
    """Whether files can be written to a folder, which may have to be made."""
    there = next(filter(Path.exists, (folder, *folder.absolute().parents)), None)
    return there is not None and there.is_dir() and os.access(there, os.W_OK)


def check_folder(option: str, file: Path) -> None:
    """Raises: ValueError where no file can be made."""
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"{option} {file}: its folder does not exist or may not be written to")


def check_new(option: str, file: Path) -> None:
    """Raises: ValueError where a file of tensors of this name is not to be written."""
    check_folder(option, file)
    if file.suffix != ".safetensors":
        raise ValueError(f"{option} {file}: its name must end in .safetensors")
    if file.exists():
        raise ValueError(f"{option} {file}: exists already; name another file")


NO_FOLDER = "is a file, not a folder, or may not be written to"        # where not may_hold()
NEW_FOLDER = checked(path, may_hold, NO_FOLDER)


def file_and_strength(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH, as in lora.safetensors:0.8. Raises: ValueError for no such number."""
    if not text:
        raise ValueError("--adapter is empty: name a file, or none")
    file, colon, number = text.rpartition(":")
    meant = file and (Path(file).exists() or re.match(r"[-+.\d]|nan$|inf", number, re.IGNORECASE))
    if not colon or not meant or Path(text).exists():    # the colon is the name's own
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"--adapter {text}: write it as FILE:STRENGTH, for example {file}:0.8")
    return Path(file), strength


def source_and_weight(text: str) -> tuple[str, float]:
    """SOURCE or SOURCE:WEIGHT, as in tiny:2. Raises: ValueError for no weight."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:                                   # a colon that belongs to the path
        return text, 1.0
    if not 0 < weight < math.inf:
        raise ValueError(f"--data {text}: the weight must be a positive number")
    return name, weight


def nearest_side(pixels: int) -> int:
    """The nearest that a made picture's side may have."""
    return min(max(16, round(pixels / 16) * 16), 8192)


def size(text: str) -> tuple[int, int]:
    """An option's type: WIDTHxHEIGHT, as in 1024x768."""
    found, example = re.fullmatch(r"(\d+)x(\d+)", text.lower()), (1024, 768)
    if found:
        width, height = map(int, found.groups())
        example = nearest_side(width), nearest_side(height)
        if example == (width, height):
            return example
    raise argparse.ArgumentTypeError(f"{text}: write it as WIDTHxHEIGHT, multiples of 16 up to "
                                     f"8192, for example {example[0]}x{example[1]}")
