"""Memory of the host that is to be locked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nnscaler.runtime.locked import host_memory


def _mapping_of(address: int) -> dict[str, list[str]]:
    """What Linux says of the mapping that holds an address."""
    inside, found = False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            begin, end = (int(one, 16) for one in name.split("-"))
            inside = begin <= address < end
        elif inside:
            found[name[:-1]] = values
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", [1, 5 * 2**20 + 3, 2**28 + 2**21])
def test_memory_is_taken_at_once_and_kept_from_forked_processes(size: int):
    memory = host_memory(size)
    assert memory.dtype == torch.uint8
    assert memory.shape == (size,)
    assert not memory.any()
    memory[-1] = 1  # it may be written to
    mapping = _mapping_of(memory.data_ptr())
    assert "sh" not in mapping["VmFlags"]
    assert "dc" in mapping["VmFlags"]
    assert int(mapping["Rss"][0]) * 1024 >= size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_locked_memory_is_copied_to_beside_computation():
    from nnscaler.runtime.locked import lock, unlock

    memory = host_memory(2**20)
    assert not memory.is_pinned()
    assert lock(memory)
    assert memory.is_pinned()
    assert not lock(memory), "a page is locked once"
    memory.copy_(torch.full((2**20,), 7, dtype=torch.uint8, device="cuda"), non_blocking=True)
    torch.cuda.synchronize()
    assert (memory == 7).all()
    unlock(memory.data_ptr())
    assert not memory.is_pinned()
