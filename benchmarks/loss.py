"""The chunked loss beside others: time and memory of forward and backward on one GPU.

    python benchmarks/loss.py

Liger and cut-cross-entropy are measured where they are installed. Memory is the peak above the inputs and cuBLAS's
workspace. Errors are of the gradients, relative to those with a softmax in fp32, on a part of their rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS, gpu_milliseconds, table, write
from chunk_linear_cross_entropy import chunk_linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [t, d], weight [n, d], labels [t] -> summed loss


def losses(chunks: list[int]) -> dict[str, Loss]:
    """The losses to compare, by name."""

    def ours(chunk: int) -> Loss:
        return lambda h, w, y: chunk_linear_cross_entropy(h[None], w, y[None], -100, chunk).sum()

    def plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum")

    def recomputed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        parts = zip(h.split(1024), y.split(1024))
        return torch.stack(
            [torch.utils.checkpoint.checkpoint(plain, hc, w, yc, use_reentrant=False) for hc, yc in parts]
        ).sum()

    found: dict[str, Loss] = {f"this project, chunks of {chunk}": ours(chunk) for chunk in chunks}
    found |= {"plain": plain, "chunks of 1024 recomputed (the document's)": recomputed}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            result = liger_fused_linear_cross_entropy(h, w, y, reduction="sum")
            return result[0] if isinstance(result, tuple) else result

        found["Liger"] = liger
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda h, w, y: linear_cross_entropy(h, w, y, reduction="sum")
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--words", type=int, default=128256)
    parser.add_argument("--chunks", default="1024", help="comma-separated chunk sizes of this project's loss")
    parser.add_argument("--output", type=Path, default=RESULTS / "loss.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    torch.manual_seed(0)
    sizes = {"dtype": torch.bfloat16, "device": "cuda"}
    hidden = torch.randn(options.tokens, options.hidden_size, **sizes).requires_grad_()
    weight = (torch.randn(options.words, options.hidden_size, **sizes) * 0.02).requires_grad_()
    labels = torch.randint(0, options.words, (options.tokens,), device="cuda")
    hidden.detach()[:64] @ weight.detach()[:64].t()  # now cuBLAS has its workspace
    inputs = torch.cuda.memory_allocated()
    floor = 6.0 * options.tokens * options.hidden_size * options.words
    rows, exact = [], None
    for name, loss in losses([int(chunk) for chunk in options.chunks.split(",")]).items():

        def run(loss: Loss = loss) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

        try:
            run()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            milliseconds = gpu_milliseconds(run)
            peak = (torch.cuda.max_memory_allocated() - inputs) / 2**30
            gradients = run()
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
            continue
        if exact is None:
            exact = _exact(hidden, weight, labels)
        error = max(_error(gradients[0][:256], exact[0]), _error(gradients[1][:256], exact[1]))
        rows.append([name, milliseconds, peak, floor / milliseconds / 1e9, error])
        del gradients
    print(table(["loss", "ms", "GiB above inputs", "TFLOP/s", "gradient error"], rows))
    keys = ("loss", "milliseconds", "gib", "tflops", "error")
    write(options.output, {"tokens": options.tokens, "hidden_size": options.hidden_size, "words": options.words,
                           "rows": [dict(zip(keys, row)) for row in rows]})  # fmt: skip


def _exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the first 256 tokens, and of the first 256 words, with softmax in fp32."""
    hidden, weight = hidden.detach(), weight.detach()
    first, words = torch.empty_like(hidden[:256], dtype=torch.float32), torch.zeros(256, hidden.shape[1], device="cuda")
    for start in range(0, len(hidden), 256):
        chunk = slice(start, start + 256)
        gradient = (hidden[chunk].float() @ weight.float().t()).softmax(1)
        gradient[torch.arange(len(gradient)), labels[chunk]] -= 1
        words += gradient[:, :256].t() @ hidden[chunk].float()
        if start == 0:
            first = gradient @ weight.float()
    return first, words


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
