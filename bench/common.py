"""What the benchmarks share: times taken in turns, memory, the rate of one large matrix product."""
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch


def told(name: str, run: Callable[..., tuple[list[float], int]], *given: object) -> None:
    """Print the least and the median time that run(*given) finds, and the most memory of the GPU.

    In a process of its own: an error of a GPU leaves nothing there that works, the next does.
    """
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            found, most = alone.submit(run, *given).result()
        print(f"{name:42} least {found[0]:.4g} s, median {median(found):.4g} s"
              f"{f', {most / 1e9:.1f} GB of the GPU' if most else ''}", flush=True)
    except RuntimeError as error:                        # what torch raises for all that goes wrong
        print(f"{name:42} failed: {str(error).splitlines()[0][:100]}", flush=True)


def finish() -> None:
    """Wait for what a GPU was told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timings(contestants: dict[str, Callable[[], object]], rounds: int,
            after: Callable[[], object] = lambda: None) -> dict[str, list[float]]:
    """Seconds of each, least first; they run one after the other in every round.

    The first round is a trial. after(): what follows each run, and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    device = torch.get_default_device()
    torch.set_default_device(None)                       # its machinery would break compiled graphs
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            finish()
            began = time.perf_counter()
            run()
            finish()
            times[name].append(time.perf_counter() - began)
            after()
    torch.set_default_device(device)
    return {name: sorted(found[1:]) for name, found in times.items()}


def measured(step: Callable[[], object], rounds: int) -> tuple[list[float], int]:
    """Seconds of a step, least first; bytes of the GPU at the most, once it was built."""
    gpu = torch.cuda.is_available()
    if gpu:                                              # building in fp32 took more
        torch.cuda.reset_peak_memory_stats()
    found = timings({"it": step}, rounds)["it"]
    return found, torch.cuda.max_memory_allocated() if gpu else 0


def median(seconds: list[float]) -> float:
    """Of times in order, as timings() gives them."""
    return seconds[len(seconds) // 2]


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    return {name: median(found) for name, found in timings(contestants, rounds).items()}


def memory(process: object = "self") -> int:
    """Bytes that are a process's own now, without mapped files; 0 when it has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 if "RssAnon" in status else 0


def block_flops(tokens: int, width: int) -> int:
    """Of the matrix products in a block of the transformer, attention's two included."""
    return 24 * tokens * width ** 2 + 4 * tokens ** 2 * width


def product_rate(tokens: int, width: int, dtype: torch.dtype, device: str | None = None) -> float:
    """FLOP/s of a large product, (tokens, width) with (width, 4 width), four in a row."""
    x, W = (torch.randn(rows, width, dtype=dtype, device=device) for rows in (tokens, 4 * width))
    def products() -> None:
        for _ in range(4):
            x @ W.T
    return 4 * 8 * tokens * width ** 2 / in_turns({"it": products}, rounds=5)["it"]
