"""Which kernel computes a call of attention: those that can do what it asks, and of them the fastest on the device.

flash_attention_4  flash-attn-4 (Hopper, Blackwell)     cudnn, sdpa     PyTorch's own
flash_attention_3  flash-attn's Hopper build            flex_attention  PyTorch's, compiled for what is asked
flash_attention_2  flash-attn                           rows            plain PyTorch, see `rows`: slow, and does all
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnscaler.errors import UserError
from nnscaler.kernels.attention import masked
from nnscaler.kernels.attention.asked import Asked
from nnscaler.kernels.attention.libraries import Run, cudnn, flash_attention, sdpa
from nnscaler.kernels.attention.probe import Kind, fastest, kind_of
from nnscaler.kernels.attention.rows import attend_by_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention.

    load  imports it, or raises ImportError
    can   the options that it has
    """

    load: Callable[[], Run]
    can: frozenset[str] = frozenset()


def _flex() -> Run:
    from nnscaler.kernels.attention import flex  # which imports torch's compiler: a second or more

    return flex.run


_ALL = frozenset({"windows", "soft caps", "sinks", "ALiBi", "documents", "documents with later keys"})
KERNELS: dict[str, Kernel] = {
    "flash_attention_4": Kernel(
        functools.partial(flash_attention, "flash_attn.cute", 0.0, None),
        frozenset({"windows", "soft caps", "sinks", "documents"}),
    ),
    "flash_attention_3": Kernel(
        functools.partial(flash_attention, "flash_attn_interface", 0.0, -1),
        frozenset({"windows", "soft caps", "documents"}),
    ),
    "flash_attention_2": Kernel(
        functools.partial(flash_attention, "flash_attn", 0.0, -1),
        frozenset({"windows", "soft caps", "ALiBi", "documents"}),
    ),
    "cudnn": Kernel(cudnn),
    "sdpa": Kernel(sdpa),
    "flex_attention": Kernel(_flex, _ALL),
    "rows": Kernel(lambda: attend_by_rows, _ALL | {"dropout"}),
}


def attend(query: Tensor, key: Tensor, value: Tensor, asked: Asked, kernel: str) -> Tensor:
    """Softmax attention: query [b, h, l, d], key [b, k, s, d], value [b, k, s, e] -> [b, l, h, e] in the type of the
    query.

    h is a multiple of k: query head i attends to key-value head i // (h / k).

    asked   the options
    kernel  a name of `KERNELS`, or "auto": the fastest on this device. On a CPU that is always sdpa, with masks where
            there are windows or documents (see `masked`); or rows where sdpa lacks an option.

    Raises UserError for a kernel that is not installed, or lacks an option.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value, asked = _in_reach(query.shape[1], key, value, asked)
    options = asked.options(query.shape[1], key.shape[1])
    check_kernel(kernel, options)
    return _chosen(query, key, value, asked, options, kernel)(query, key, value, asked)


def check_kernel(kernel: str, options: frozenset[str]) -> None:
    """Raises UserError where a kernel lacks an option that is asked for."""
    if kernel == "auto" or options <= KERNELS[kernel].can:
        return
    others = ", ".join(["auto", *(name for name, other in KERNELS.items() if options <= other.can)])
    missing = " and ".join(sorted(options - KERNELS[kernel].can))
    raise UserError(f"the attention kernel '{kernel}' has no {missing}, which the model asks for; use one of {others}")


def _in_reach(rows: int, key: Tensor, value: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Asked]:
    """The same call without keys that no row sees, and without limits that hide no key."""
    keys = key.shape[1]
    begin = 0 if asked.left is None else max(0, asked.first - asked.left)
    end = keys if asked.right is None else min(keys, asked.first + rows + asked.right)
    first, keys = asked.first - begin, end - begin
    left = None if asked.left is None or asked.left >= first + rows - 1 else asked.left
    right = None if asked.right is None or first + asked.right >= keys - 1 else asked.right
    documents = None if asked.documents is None else asked.documents.part(slice(None), slice(begin, end))
    if documents is not None and documents.are_rows:
        documents = None
    dropped = None if asked.dropped is None else asked.dropped.from_key(begin)
    asked = replace(asked, first=first, left=left, right=right, documents=documents, dropped=dropped)
    return key[:, begin:end], value[:, begin:end], asked


def _chosen(query: Tensor, key: Tensor, value: Tensor, asked: Asked, options: frozenset[str], kernel: str) -> Run:
    if not query.is_cuda:
        if options and options <= masked.OPTIONS and query.shape[3] == value.shape[3]:
            return masked.attend_under_masks
        return _load("rows" if options else "sdpa")
    return _load(_probed(kind_of(query, key, value, asked), options) if kernel == "auto" else kernel)


@functools.cache
def _load(kernel: str) -> Run:
    try:
        return KERNELS[kernel].load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the attention kernel '{kernel}' is not installed ({error}); use auto, cudnn or sdpa"
        ) from None


@functools.cache
def _probed(kind: Kind, options: frozenset[str]) -> str:
    """The fastest kernel. It is found in a thread of its own.

    Otherwise a checkpoint around the call would count what the probe keeps for its own backward.
    """
    able = {name: kernel.load for name, kernel in KERNELS.items() if options <= kernel.can and name != "rows"}
    if not able:
        logger.warning("no fast kernel of attention has %s: it is computed by plain PyTorch", " and ".join(options))
        return "rows"

    def probe() -> str | None:
        with torch.cuda.device(kind.device):
            torch.cuda.synchronize()  # what was launched before is not the kernels' time
            return fastest(kind, able)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(probe).result() or "rows"
