"""Memory that a training step frees stays with the process, on a CPU.

By default glibc hands large blocks back to the system and fetches them again in every step, and the system clears each
page anew: a sixth of a step (docs/decisions.md). Elsewhere these settings mean nothing.
"""

import ctypes
import platform

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # workers train in a thread, and only the main arena keeps large blocks
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 62),
}
"""For a process that is to be started."""

_MALLOPT = {-8: 1, -4: 0, -1: -1}
"""The same as malloc.h numbers them: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, which -1 turns off."""


def keep_freed_memory() -> None:
    """The same for this process, before it has other threads."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in _MALLOPT.items():
            libc.mallopt(parameter, value)
