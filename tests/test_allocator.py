"""Memory that a step frees is there for the next one: the system's page faults tell."""

import os
import platform
import subprocess
import sys

import pytest

from pipelines import allocator

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
BLOCK, BLOCKS = 40 << 20, 3  # a thread's arena holds one of them in a piece

STEPS = f"""
import ctypes, resource, sys, threading
from pipelines import allocator

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def step():
    blocks = [libc.malloc({BLOCK}) for _ in range({BLOCKS})]
    for block in blocks:
        ctypes.memset(block, 1, {BLOCK})
    for block in blocks:
        libc.free(block)

def faults():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "asked":
    allocator.keep_freed_memory()
if sys.argv[2] == "thread":
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
else:
    faults()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
@pytest.mark.parametrize(
    ("how", "where", "kept"),
    [("started", "main", True), ("started", "thread", True), ("asked", "main", True), ("not at all", "main", False)],
)
def test_a_step_finds_the_memory_of_the_last_one(how: str, where: str, kept: bool) -> None:
    """Fails without any of the settings; that of the arenas matters in a thread."""
    plain = {name: value for name, value in os.environ.items() if name not in allocator.ENVIRONMENT}
    environment = plain | (allocator.ENVIRONMENT if how == "started" else {})
    command = [sys.executable, "-c", STEPS, how, where]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    faults, pages = int(told.stdout), 4 * BLOCKS * BLOCK // PAGE
    assert faults < pages / 50 if kept else faults > pages / 2
