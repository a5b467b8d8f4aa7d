"""Memory that stays with the process between training steps.

Every step makes the same large arrays anew: gradients, reconstructions, errors. The C library gives
memory of that size back to the system at once, and the system hands it out again page by page and
filled with zeros, which can cost more than what is computed into it. What is kept is at most what
the process held at its largest.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of glibc's `mallopt`."""


def keep_freed_memory() -> bool:
    """Let the process keep what it frees; False where the C library cannot be told to."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
