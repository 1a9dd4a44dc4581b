"""What the package's kernels for GPUs use of Triton's language, in plain PyTorch, so that a CPU runs their source.

The programs of a launch run one after the other, the last first: no kernel may hang on an order. What is read where a
mask is false is no number, and memory beside a tensor's own must not be read or written at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class OnGpu(Tensor):
    """A tensor that says of itself that it lies on a GPU."""

    is_cuda = True


@dataclass
class Pointer:
    """The address of an element of a tensor, or of several: a tensor of offsets."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """(offsets, and where they count)"""
        at = torch.as_tensor(self.offset)
        counts = torch.as_tensor(True if mask is None else mask).expand(at.shape)
        inside = (at >= 0) & (at < len(self.memory))
        assert bool((inside | ~counts).all()), "beside the tensor's memory"
        return at.where(counts, 0), counts


def load(pointer: Pointer, mask: Any = None, other: float | None = None, eviction_policy: str = "") -> Tensor:
    at, counts = pointer.places(mask)
    missing = torch.full((), float("nan") if other is None else other).to(pointer.memory.dtype)
    return pointer.memory[at].where(counts, missing)


def store(pointer: Pointer, value: Any, mask: Any = None, eviction_policy: str = "") -> None:
    at, counts = pointer.places(mask)
    pointer.memory[at[counts]] = torch.as_tensor(value).expand(at.shape)[counts].to(pointer.memory.dtype)


class Kernel:
    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            given = [Pointer(_flat(one)) if isinstance(one, Tensor) else one for one in args]
            for program in reversed(range(*grid)):
                LANGUAGE.program_id = lambda axis, program=program: torch.tensor(program, dtype=torch.int32)
                self.function(*given, **constants)

        return launch


def _flat(tensor: Tensor) -> Tensor:
    plain = tensor.detach().as_subclass(Tensor)
    return plain.view(-1) if plain.is_contiguous() else plain.as_strided((_reach(plain),), (1,))


def _reach(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


LANGUAGE: Any = ModuleType("triton.language")
vars(LANGUAGE).update(
    load=load, store=store, constexpr=object(), float32=torch.float32, int64=torch.int64, arange=torch.arange,
    full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype: torch.zeros(shape, dtype=dtype), reshape=torch.reshape, maximum=torch.maximum,
    max=torch.amax, sum=torch.sum, exp2=torch.exp2, log2=torch.log2, cdiv=lambda a, b: -(-a // b),
    where=lambda condition, one, other: torch.as_tensor(one).where(condition, other),
)  # fmt: skip
TRITON: Any = ModuleType("triton")
vars(TRITON).update(jit=Kernel, language=LANGUAGE)
MODULES = {"triton": TRITON, "triton.language": LANGUAGE}
