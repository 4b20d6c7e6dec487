"""Memory that a large request took, back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable

LARGE = 1 << 20  # bytes of a request and its answer
_pending = False


def give_back_after(num_bytes: int) -> None:
    """When a call of this size is over: soon, once for all such calls, in a thread.

    A refused body is held by its exception, in a cycle that Python collects much later; and glibc
    keeps what was freed in the middle of its heaps: after a body of 31 MB, gigabytes.
    """
    global _pending
    if num_bytes < LARGE or _pending or _malloc_trim is None:
        return
    _pending = True
    asyncio.get_running_loop().call_later(0.5, _start)


def _start() -> None:
    global _pending
    _pending = False
    if _malloc_trim is not None:
        asyncio.get_running_loop().run_in_executor(None, _give_back, _malloc_trim)


def _give_back(malloc_trim: Callable[[int], int]) -> None:
    gc.collect()  # short: SGLang has frozen all that was there at the start
    malloc_trim(0)


def _find() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # no glibc
        return None


_malloc_trim = _find()
