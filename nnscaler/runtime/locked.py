"""Page-locked memory of the host, which a GPU reads and writes by itself, beside what else it does.

Most of the time that locking takes goes into the system's finding and clearing of pages. So they are asked for in large
pages (2 MiB), of which there are 512 times fewer, and several threads clear them. They belong to this process alone and
are kept from processes forked off it: after a fork the system copies a page when it is written to next, and a GPU would
go on writing to the page that was locked.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

THREADS = 8  # more do not clear pages faster


def host_memory(size: int) -> Tensor:
    """Bytes of the host in pages of their own, all zero, and all taken from the machine at once.

    size  at least 1

    Returns uint8, [size].
    """
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with suppress(AttributeError, OSError):  # systems without it give the memory all the same
            pages.madvise(getattr(mmap, advice))
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    processors = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with ThreadPoolExecutor(max(1, min(THREADS, processors))) as threads:
        list(threads.map(Tensor.zero_, memory.split(2**28)))
    return memory


def lock(memory: Tensor) -> bool:
    """Locks the pages of a contiguous tensor, and says whether the system did. A page can be locked once. (torch's own
    allocator of such memory would take up to the next power of two.)"""
    locked = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0
    if not locked and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # CUDA keeps the error for whoever asks next: that would be what is computed next
            torch.zeros(1, device="cuda")
    return locked


def unlock(address: int) -> None:
    """To be called when no copy may be under way to memory that was locked at `address`, before it is given back."""
    torch.cuda.cudart().cudaHostUnregister(address)
