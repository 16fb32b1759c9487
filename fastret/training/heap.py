"""Keeps freed memory in the process, where the C library would give every large tensor back to the system."""

import ctypes
import platform

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NEVER = -1


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory of any size; nothing happens with another C library.

    A step allocates activations of 64 MB and frees them. By default each is a mapping of its own, whose pages the
    system must clear anew every time: measured, half of a step's time. For a process that does little else than train.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
