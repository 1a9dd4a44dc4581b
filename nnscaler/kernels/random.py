"""Random numbers that depend on a counter instead of on what was drawn before: any part of a tensor gets the numbers
that it has in the whole, on any device, as often as they are drawn.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011). Its
counter has the number of an element in the whole tensor, the micro-batch and the step; its key has the seed and the
place in the model.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DRAWS = "draws"  # the input by which a compiled model is told what its micro-batch draws

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def draws_of(seed: int, step: int, micro_batch: int, device: torch.device | None = None) -> Tensor:
    """What is drawn in a micro-batch, int64 [1, 5]: two words of the seed; the step; the micro-batch, counted over all
    copies of the model; and 1.

    A GPU fills them in: a copy there would wait for what an update brings from the host.
    """
    numbers = seed & _WORD, seed >> 32 & _WORD, step, micro_batch, 1
    return torch.stack([torch.full((1,), number, dtype=torch.int64, device=device) for number in numbers], dim=1)


def no_draws(device: torch.device | None = None) -> Tensor:
    """In place of `draws_of`: nothing is dropped, as in evaluation."""
    return torch.zeros((1, 5), dtype=torch.int64, device=device)


def place_of(path: str, ordinal: int) -> Tensor:
    """A place in the model, int64 []: the drawing call of this number that a module makes in one forward."""
    digest = hashlib.sha256(f"{path} {ordinal}".encode()).digest()
    return torch.tensor(int.from_bytes(digest[:8], "big") >> 1)


def caller_of(path: str, kind: str) -> str:
    """The module that draws, by path and class of the innermost one that runs: for a `Dropout`, that which it lies
    in."""
    return path.rpartition(".")[0] if kind == "Dropout" else path


def numbers_along(size: int, stride: int, device: torch.device | None = None) -> Tensor:
    """int64 [size]: by how much each index along a dimension raises an element's number."""
    return torch.arange(size, device=device) * stride


def numbers_of(shape: Sequence[int], device: torch.device | None = None) -> list[Tensor]:
    """`numbers_along` each dimension of a whole tensor. An element's number is their sum: its place in memory."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return [numbers_along(size, stride, device) for size, stride in zip(shape, strides)]


def together(numbers: Sequence[Tensor]) -> Tensor:
    """The number of each element, from those along each dimension."""
    return functools.reduce(lambda outer, inner: outer.unsqueeze(-1) + inner, numbers)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. All are int64 tensors of 32-bit words that broadcast: four of counter, two of key, four drawn."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # whose 64 bits are right, whatever their sign
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def kept(p: float, draws: Tensor, place: Tensor, numbers: Tensor) -> Tensor:
    """Which elements are not dropped, where each is with probability `p`: bool, of the shape of `numbers`.

    draws    of the micro-batch, see `draws_of`
    place    in the model, see `place_of`
    numbers  of the elements in the whole tensor
    """
    low, high, step, micro_batch, on = draws[0].unbind()
    counter = numbers & _WORD, numbers >> 32 & _WORD, micro_batch, step
    word, *_ = philox(counter, (low ^ place & _WORD, high ^ place >> 32))
    return word >= on * round(p * 2**32)


def kept_at_once(p: float, draws: Tensor, place: Tensor, numbers: Tensor) -> Tensor:
    """`kept`, for what is not compiled: on a GPU it is compiled by itself, for it would be some hundred kernels."""
    return (_compiled() if numbers.is_cuda else kept)(p, draws, place, numbers)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(kept)


def dropout(x: Tensor, p: float, draws: Tensor, place: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """`x`, in which each element is zero with probability `p`, and else divided by 1 - p.

    x        a part of a whole tensor, of any float type and one dimension or more
    draws    of the micro-batch, int64 [1, 5], see `draws_of`
    place    in the model, int64 [], see `place_of`
    numbers  for each dimension of x, int64 [its size]: those that `numbers_of` the whole tensor's shape has for this
             part; or for the first dimensions alone: what differs in the others is dropped together
    """
    stays = kept(p, draws, place, together(numbers))
    stays = stays.view(*stays.shape, *(1 for _ in x.shape[len(numbers) :]))
    return torch.where(stays, x * scale_of(p, draws, x.dtype), 0.0)


def scale_of(p: float, draws: Tensor, dtype: torch.dtype) -> Tensor:
    """By what is multiplied what is kept, [] in `dtype`, but fp32 at least."""
    more = 1 / (1 - p) - 1 if p < 1 else 0.0
    return 1 + more * draws[0, 4].to(torch.promote_types(dtype, torch.float32))


# An operator of torch, so that graphs and generated code can call it; it is made of others, which are fused.
_library = torch.library.Library("nnscaler", "FRAGMENT")
_library.define("dropout(Tensor input, float p, Tensor draws, Tensor place, Tensor[] numbers) -> Tensor")
_library.impl("dropout", dropout, "CompositeImplicitAutograd")


@torch.library.custom_op("nnscaler::drop", mutates_args=())
def drop(x: Tensor, p: float, by_feature: bool) -> Tensor:
    """Stands for a call of torch's dropout while a model is traced; by_feature: what differs in the first two
    dimensions alone is dropped together."""
    raise AssertionError("it is traced, not run")


@drop.register_fake
def _(x: Tensor, p: float, by_feature: bool) -> Tensor:
    return torch.empty_like(x)
