"""What the C library's allocator does with memory that PyTorch frees on a CPU: it keeps it, and takes huge pages.

By default it gives large tensors back to the system when they are freed, which then clears the same pages again for the
next one, 4 KiB at a time. That takes a large part of the time in which a clip is decoded.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SETTINGS = {M_TRIM_THRESHOLD: 256 << 20, M_MMAP_THRESHOLD: 16 << 20}  # bytes
OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Set the allocator of this process, unless the user has set it, or the C library is another one than glibc.

    Call it before PyTorch is imported, and only in a process that ends with its command: a program that imports slagen
    has settings of its own.
    """
    if sys.platform != "linux" or any(name in os.environ for name in OF_THE_USER):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's: huge pages for tensors of 2 MiB and more
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        for name, value in SETTINGS.items():
            mallopt(name, value)
