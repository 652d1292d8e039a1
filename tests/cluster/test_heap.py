"""What a worker frees stays in its process: measured in processes of their own, since it cannot be taken back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from cluster.heap import keep_freed_memory

def forward():
    return [np.ones(2 * 2**20, np.uint8) for _ in range(12)]

def work():
    for _ in range(10):
        forward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        forward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep":
    assert keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@needs_glibc
def test_buffers_that_are_asked_for_again_are_not_faulted_in_again() -> None:
    assert page_faults("keep") < page_faults("default") / 4
