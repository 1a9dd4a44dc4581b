"""The chunked loss beside others: time and memory of forward and backward on one GPU.

    python benchmarks/loss.py

Liger and cut-cross-entropy are measured where they are installed. Memory is the peak above the inputs and cuBLAS's
workspace. Errors are those of both gradients against fp64, relative, on 256 of their rows. `--beside` takes another
version of chunk_linear_cross_entropy.py, such as an older one, and measures it in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
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


def losses(chunks: list[int], beside: Path | None) -> dict[str, Loss]:
    """The losses to compare, by name."""

    def ours(chunk: int, function: Callable[..., Tensor] = chunk_linear_cross_entropy) -> Loss:
        return lambda h, w, y: function(h[None], w, y[None], -100, chunk).sum()

    def plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum")

    def recomputed(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        parts = zip(h.split(1024), y.split(1024))
        return torch.stack(
            [torch.utils.checkpoint.checkpoint(plain, hc, w, yc, use_reentrant=False) for hc, yc in parts]
        ).sum()

    found: dict[str, Loss] = {f"this project, chunks of {chunk}": ours(chunk) for chunk in chunks}
    if beside is not None:
        spec = importlib.util.spec_from_file_location("beside", beside)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        other = module.chunk_linear_cross_entropy
        found |= {f"{beside.name}, chunks of {chunk}": ours(chunk, other) for chunk in chunks}
    found |= {"plain": plain, "chunks of 1024 recomputed (the document's)": recomputed}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def liger(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            result = liger_fused_linear_cross_entropy(h, w, y, reduction="sum")
            return result[0] if isinstance(result, tuple) else result

        def liger_fp32(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            result = liger_fused_linear_cross_entropy(h, w, y, reduction="sum", accum_dtype=torch.float32)
            return result[0] if isinstance(result, tuple) else result

        found |= {"Liger": liger, "Liger, summed in fp32": liger_fp32}
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
    parser.add_argument("--beside", type=Path, help="another version of chunk_linear_cross_entropy.py")
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
    for name, loss in losses([int(chunk) for chunk in options.chunks.split(",")], options.beside).items():

        def run(loss: Loss = loss) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))

        try:
            run()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            milliseconds = gpu_milliseconds(run)
            peak = (torch.cuda.max_memory_allocated() - inputs) / 2**30
            gradients = run()
        except (torch.OutOfMemoryError, TypeError) as problem:  # an older Liger has no accum_dtype
            print(f"{name}: {type(problem).__name__}")
            continue
        if exact is None:
            exact = _exact(hidden, weight, labels)
        errors = [100 * _error(found[:256], right) for found, right in zip(gradients, exact)]
        rows.append([name, milliseconds, peak, floor / milliseconds / 1e9, *errors])
        del gradients
    print(table(["loss", "ms", "GiB above inputs", "TFLOP/s", "error % hidden", "weight"], rows))
    keys = ("loss", "milliseconds", "gib", "tflops", "error_hidden_percent", "error_weight_percent")
    write(options.output, {"tokens": options.tokens, "hidden_size": options.hidden_size, "words": options.words,
                           "rows": [dict(zip(keys, row)) for row in rows]})  # fmt: skip


def _exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the first 256 tokens, and of the first 256 words, in fp64."""
    hidden, weight = hidden.detach(), weight.detach().double()
    first, words = None, torch.zeros(256, hidden.shape[1], dtype=torch.float64, device="cuda")
    for start in range(0, len(hidden), 256):
        chunk = slice(start, start + 256)
        gradient = (hidden[chunk].double() @ weight.t()).softmax(1)
        gradient[torch.arange(len(gradient)), labels[chunk]] -= 1
        words += gradient[:, :256].t() @ hidden[chunk].double()
        if first is None:
            first = gradient @ weight
    assert first is not None
    return first, words


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
