"""Memory that a training step frees stays with the process, on a CPU.

By default glibc hands large blocks back to the system and fetches them again in every step, and the system clears each
page anew: 15% of a step (docs/benchmarks.md). Elsewhere these settings mean nothing.
"""

import ctypes
import platform

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # workers train in a thread, and only the main arena keeps large blocks
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}
"""For a process that is to be started."""

_MALLOPT = {"MALLOC_ARENA_MAX": -8, "MALLOC_MMAP_MAX_": -4, "MALLOC_TRIM_THRESHOLD_": -1}  # as malloc.h numbers them


def keep_freed_memory() -> None:
    """The same for this process, before it has other threads."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for name, value in ENVIRONMENT.items():
            libc.mallopt(_MALLOPT[name], int(value))
