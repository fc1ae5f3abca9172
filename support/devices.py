"""Devices: which one, how much memory it has, which type it is fast in, and compiling for it.

sample.load_pipeline() asks when it places a model; the commands ask for --compile.
"""
import ctypes
import os
import platform
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from shutil import which

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import dit
from support import fp8
from support.commands import is_first

ROOM = 0.8                                               # of a device's memory, for weights
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3              # of glibc's malloc.h
LARGE = 1e9                                              # bytes of weights that take a while
COMPILERS = {"darwin": "clang++", "win32": "cl"}         # that torch.compile takes, else g++
CONTAINER = Path("/sys/fs/cgroup")                       # its limits, where Linux sets some


def fast_bf16() -> bool:
    """Whether the processor has units for bf16; on others PyTorch's is slower than fp32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))


FAST_BF16 = fast_bf16()                                  # once: a compiled graph cannot ask


def choose_device(name: str, matmul: str | None = None) -> torch.device:
    """auto: an accelerator where there is one. matmul: "fp8", if it shall multiply so.

    Raises: ValueError for what this machine has not.
    """
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", name):
        raise ValueError(f"--device {name}: write auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = textwrap.shorten(str(error).partition("\n")[0], 120)
        raise ValueError(f"--device {name}: unusable here ({why})") from None
    if matmul:
        fp8.check_products(device)
    return device


def memory(device: torch.device) -> int:
    """Bytes: on a CUDA device those that are free, on others all that they may have."""
    if device.type == "cuda":                            # what PyTorch keeps for itself is free too
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if not hasattr(os, "sysconf"):                       # Windows does not say
        return 16 * 2 ** 30
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, of_container("memory.max") or whole)


def of_container(name: str) -> int:
    """What a container's file of this name says, in bytes; 0 outside of one, or without a limit."""
    file = CONTAINER / name
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else 0


def home(device: torch.device, needed: int) -> tuple[torch.device, bool]:
    """Where weights of so many bytes stay: on the device, or where it has no room, on the CPU.

    And whether in the type that they are stored in: on a CPU where fp32 would not fit.
    """
    stay = device if needed < ROOM * memory(device) else torch.device("cpu")
    return stay, device.type == "cpu" and needed >= memory(device) / 2


def available() -> int:
    """Bytes of the computer's memory that can be had now; 0 where the system does not say."""
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", file.read_text()) if file.is_file() else None
    free = int(found[1]) * 1024 if found else 0
    if limit := of_container("memory.max"):
        stat = CONTAINER / "memory.stat"
        told = stat.read_text() if stat.is_file() else ""
        of_files = sum(map(int, re.findall(r"^(?:in)?active_file (\d+)", told, re.M)))
        used = of_container("memory.current") - of_files         # those it gives up at need
        free = min(free, max(0, limit - used))
    return free


def choose_dtype(name: str, device: torch.device, stored: int) -> torch.dtype:
    """auto: bf16 on an accelerator; on a CPU only where it is fast and the model large.

    Large: in fp32 it would not fit in half the memory.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if FAST_BF16 and 2 * stored >= memory(device) / 2 else torch.float32


def attend_in_fp32(q: Tensor, k: Tensor, v: Tensor, pe: Tensor,
                   rotate: Callable = dit.rotate) -> Tensor:
    """dit.attend() in training on a CPU: in bf16 its backward takes up to 10 times as long.

    With units for bf16 that holds where tokens are few and heads narrow; q, k, v (B, N, ., d).
    """
    if q.requires_grad and not (FAST_BF16 and k.shape[2] * k.shape[3] > 2 ** 14):
        return dit.attend(q.float(), k.float(), v.float(), pe, rotate).to(v.dtype)
    return dit.attend(q, k, v, pe, rotate)


def rotate_in_reals(x: Tensor, pe: Tensor) -> Tensor:
    """dit.rotate() for compiled blocks. x (B, N, S, d), pe (S, d/2) complex.

    The compiler fuses this into one kernel, which it cannot do with complex products; uncompiled
    it is several times as slow as they are.
    """
    cos, sin = torch.view_as_real(pe).unbind(-1)         # each (S, d/2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)   # each (B, N, S, d/2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def ready(model: dit.FluxTransformer, vae: nn.Module, device: torch.device,
          dtype: torch.dtype, matmul: str | None = None) -> None:
    """Give models the forms of operations and layouts of memory that the device is quicker at."""
    if matmul == "fp8":
        fp8.multiply_in_fp8(model, device)
    if device.type == "cpu":                             # convolutions are (on a GPU they are not,
        vae.to(memory_format=torch.channels_last)        # with the norms between them)
    if device.type == "cpu" and dtype == torch.bfloat16:
        for block in model.blocks:
            block.attend = attend_in_fp32


def announce(what: str, nbytes: float) -> None:
    """A line before work on so many bytes of weights, where that is enough to look hung."""
    if nbytes > LARGE and is_first():
        print(f"{what} ...", file=sys.stderr)


class Uninitialised(TorchFunctionMode):
    """Within the `with`, modules are built without drawing first weights."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Build modules on the meta device: shapes and types, no memory.

    To draw numbers even there PyTorch imports its compiler: a third of the time of a small edit.
    """
    with torch.device("meta"), Uninitialised():
        yield


def check_finite(given: Tensor, part: str, dtype: torch.dtype) -> None:
    """Raises: ValueError where numbers are lost, of which a flat picture would be made."""
    if not given.isfinite().all():
        wider = "try --dtype bfloat16, " if dtype == torch.float16 else ""
        raise ValueError(f"{part} gives numbers that are not finite: {wider}the adapter may be too "
                         "strong, or a file of the model damaged")


def keep_freed_memory() -> None:
    """Have glibc keep what a training step frees for the next one, which needs as much.

    Else large tensors go back to the system, which clears their pages for the next: up to a third
    of a step's time. Nothing is done elsewhere, or where the user has set how memory is kept.
    """
    asked = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if platform.libc_ver()[0] != "glibc" or asked:
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2 ** 25)              # bytes; the most that it takes
    libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def check_compiler() -> None:
    """Raises: ValueError when the one that torch.compile would take is not there."""
    compiler = os.environ.get("CXX", COMPILERS.get(sys.platform, "g++"))
    if not which(compiler):
        raise ValueError(f"--compile: needs a C++ compiler; there is no {compiler}")


def uncompiled() -> AbstractContextManager:
    """A `with` in which all is computed as it is written, compiled or not."""
    here = "torch._dynamo" in sys.modules                # takes seconds to import
    return torch.compiler.set_stance("force_eager") if here else nullcontext()


def compile_blocks(model: nn.Module) -> None:
    """Have the blocks compiled when they first run; those of a kind share what is compiled."""
    if is_first():
        print("compiling: the first step takes half a minute or more", file=sys.stderr)
    warnings.filterwarnings("ignore", ".*complex operators")     # the positions' table is read
    warnings.filterwarnings("ignore", ".*_prims_common.check")   # the compiler's own business
    torch._dynamo.config.recompile_limit = 64            # for other numbers of tokens, conditions
    attend = partial(model.blocks[0].attend, rotate=rotate_in_reals)     # one object for all, or
    for block in model.blocks:                           # each block would be compiled by itself
        block.attend = attend
        block.compile()
