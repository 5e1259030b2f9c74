"""How calls of an encoder share a CPU: a core to each, since the products of one protein are too small to share."""

import os
from pathlib import Path

CPU_TOKENS = 1024
"""Of a call: so few that what one layer writes is still in the cache when the next step reads it."""
MOST_CALLS = 16
"""At once; with more cores each call gets several. Python begins the operators of all of them, one at a time."""


def calls_at_once(threads: int | None) -> tuple[int, int]:
    """How many calls run at a time on so many cores (none: all of this process), and the threads of each."""
    threads = threads or num_cores()
    threads_per_call = -(-threads // MOST_CALLS)
    return threads // threads_per_call, threads_per_call


def num_cores() -> int:
    """Cores for this process: OMP_NUM_THREADS where it is set, as launchers do, else those it may run on."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a container may have less of each than there are
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
