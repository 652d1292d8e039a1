"""Keeps freed memory in the process, for workers that ask for the same large buffers again and again."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
"""glibc's numbers, from its malloc.h; mallopt(3) describes them."""

_LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""glibc refuses more on 64-bit machines."""

_NEVER_TRIM = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of giving it back; False where there is no glibc, which changes nothing.

    By default every forward pass returns its buffers to the kernel and faults them in again, zeroed, on the next.
    The process stays as large as its largest moment was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
