"""What the C library's allocator does with memory that PyTorch frees on a CPU: it keeps it, and takes huge pages.

By default it gives large tensors back to the system when they are freed, which then clears the same pages again for the
next one, 4 KiB at a time, which is a large part of the time of decoding a clip.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SETTINGS = {M_TRIM_THRESHOLD: 256 << 20, M_MMAP_THRESHOLD: 16 << 20}  # bytes
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Set this process's allocator, before PyTorch is imported; where the user has set it, or it is another, do not.

    It is for a process that ends with its command: programs that import slagen have settings of their own.
    """
    if sys.platform != "linux" or any(name in os.environ for name in OWN):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's: huge pages for tensors of 2 MiB and more
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        for name, value in SETTINGS.items():
            mallopt(name, value)
