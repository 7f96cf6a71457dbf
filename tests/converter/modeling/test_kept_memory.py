"""Memory that trainings free stays with the process: no page is asked for twice."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource
from sparsegate.converter.modeling.processes import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [libc.malloc(size) for _ in range(2)]
        for block in blocks:
            ctypes.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(20 << 20))
keep_freed_memory()
faults(20 << 20)
print(faults(20 << 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    if plain < 1000:
        pytest.skip("this C library keeps it anyway")
    assert kept < 0.05 * plain
