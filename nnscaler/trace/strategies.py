"""The ways to trace a model, in one list."""

from __future__ import annotations

from dataclasses import dataclass

from nnscaler.errors import UserError


@dataclass(frozen=True)
class Strategy:
    """One way to trace.

    summary  what it does, for users
    reuse    True: each distinct repeated module is traced once. False: each one is, and equal ones are merged
             afterwards.
    device   where the model is executed before it is traced, so that the values it reads are known; None: nowhere
    offload  whether weights and activations stay on the CPU, and only one operator at a time runs on `device`
    """

    summary: str
    reuse: bool = False
    device: str | None = None
    offload: bool = False

    @property
    def executes(self) -> bool:
        """Whether the model is executed with real values."""
        return self.device is not None


STRATEGIES = {
    "reuse_cache": Strategy("nothing is computed, each distinct layer is traced once", reuse=True),
    "meta": Strategy("nothing is computed, every layer is traced"),
    "cpu": Strategy("executed on the CPU first, for models whose Python reads tensors' values", device="cpu"),
    "cuda": Strategy("the same on a GPU that holds the whole model", device="cuda"),
    "cuda_run_cpu_offload": Strategy(
        "the same with weights and activations on the CPU, and one operator at a time on the GPU",
        device="cuda",
        offload=True,
    ),
}


def find_strategy(name: str) -> Strategy:
    """The strategy of this name. Raises UserError where there is none, or the machine lacks the device that it
    needs."""
    if name not in STRATEGIES:
        raise UserError(f"trace strategy is '{name}'; allowed are {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[name]
    if strategy.device == "cuda" and not _has_cuda():
        without = ", ".join(other for other, known in STRATEGIES.items() if known.device != "cuda")
        raise UserError(f"trace strategy '{name}' needs a CUDA device, and there is none; allowed here are {without}")
    return strategy


def _has_cuda() -> bool:
    import torch  # which naming a strategy need not wait for

    return torch.cuda.is_available()
