"""How the tables of this folder are measured: in turns, by CPU time, as ratios of one run.

Wall time on a shared machine says more about its neighbours than about the code. So each function runs on one thread
and is charged with the CPU time it took; every repeat runs all functions, in another order each time; and what is
reported is the median over the repeats of the ratio within one repeat, with the lowest and highest beside it.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

# Freed memory is kept and used again. Otherwise every large tensor costs page faults, more or fewer as it happens.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "HF_HUB_OFFLINE": "1",
}


def restart_with_settings():
    """Start the program again where its environment is not the one above: a C library reads it once."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})


class Ratio(NamedTuple):
    """A ratio of times: the median over the repeats, the lowest and the highest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.2f}-{self.high:.2f}]"


def measure(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each function in each repeat, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    names = list(functions)
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.process_time()
            functions[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> Ratio:
    """How long `name` takes, in units of `reference`."""
    ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[reference], strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def heading(text: str):
    """Say what follows and what it ran on."""
    import torch
    import transformers

    with open("/proc/cpuinfo") as file:
        lines = file.read().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    bf16 = [flag for flag in flags if flag in ("avx512_bf16", "amx_bf16")]
    print(f"\n## {text}\n")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {processor}, ", end="")
    print(f"{torch.get_num_threads()} thread, bf16 instructions: {', '.join(bf16) or 'none'}\n")
    print("| ratio | measured | must | goal | |\n|---|---|---|---|---|")


def row(label: str, found: Ratio, must: float, goal: float, higher_is_better: bool = False):
    """One line of a table: what was found, what was asked for, and which of it was reached."""
    sign = -1 if higher_is_better else 1
    reached = (
        "goal" if sign * found.median <= sign * goal else "must" if sign * found.median <= sign * must else "missed"
    )
    print(f"| {label} | {found} | {must:.2f} | {goal:.2f} | {reached} |", flush=True)
