"""Memory of the host that is to be locked."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnscaler.runtime import locked
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


@pytest.mark.parametrize(
    ("processors", "processes", "threads"), [(64, None, 8), (64, "4", 8), (12, "4", 3), (2, "4", 1)]
)
def test_the_processes_of_a_node_share_its_processors(processors, processes, threads, monkeypatch):
    asked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            asked.append(count)
            super().__init__(1)

    monkeypatch.setattr(locked, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(locked.os, "sched_getaffinity", lambda pid: range(processors))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    host_memory(5)
    assert asked == [threads]


def test_all_of_a_tensor_s_pages_are_locked_from_its_beginning(monkeypatch):
    asked = []
    library = SimpleNamespace(
        cudaHostRegister=lambda *given: asked.append(given) or len(asked) - 1, cudaHostUnregister=asked.append
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    memory = torch.zeros(5, 3)[1:]
    assert [locked.lock(memory), locked.lock(memory)] == [True, False]
    locked.unlock(memory.data_ptr())
    assert asked == [(memory.data_ptr(), 48, 0)] * 2 + [memory.data_ptr()]


def test_a_refusal_is_not_left_for_what_is_computed_next(monkeypatch):
    """CUDA gives its last error to whoever asks next, which training must not be."""
    asked = []

    def zeros(*size: int, device: str) -> None:
        asked.append(device)
        raise RuntimeError("CUDA error: part or all of the requested memory range is already mapped")

    memory, answers = torch.zeros(5), iter([0, 712])
    library = SimpleNamespace(cudaHostRegister=lambda *given: next(answers))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert locked.lock(memory)
    assert not asked
    assert not locked.lock(memory)
    assert asked == ["cuda"]
