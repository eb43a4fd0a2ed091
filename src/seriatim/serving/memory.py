"""Memory that was freed goes back to the system from time to time: glibc keeps holes between buffers of changing size,
and a server that runs for days would grow by them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

EVERY = 30.0  # seconds; it takes a few milliseconds


def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return None


class Trimmer:
    """Gives freed memory back when it is called, but not more often than `EVERY`."""

    def __init__(self, trim: Callable[[int], int] | None = None):
        self.trim = trim or _trim()
        self.last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self.trim is not None and now - self.last >= EVERY:
            self.last = now
            self.trim(0)
