"""Random small modules, planned, generated and run on two processes: loss and gradients are those of PyTorch.

`FUZZ=1000 python -m pytest tests/test_fuzz.py` tries more of them, and others each time.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from nnscaler import ComputeConfig, Source, compile_model
from nnscaler.runtime.module import ParallelModule
from tests import tiny
from tests.fuzz import DEVICES, Called, Random, of_tables, registered, split_at_random
from tests.launch import run

EXAMPLES = int(os.environ.get("FUZZ", 40))
X = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-5  # gradients are kept in fp32


def wrong_here(folder: Path, calls: list[Called], choices: int) -> str:
    """What this process finds wrong with one module that is split over all processes; empty: nothing."""
    plain = Random(calls)
    loss = plain(X)
    if not loss.requires_grad:
        return ""
    loss.backward()
    if dist.get_rank() == 0:
        hardware = tiny.write_hardware(folder.parent)
        config = ComputeConfig(DEVICES, DEVICES, hardware=hardware, pas_policy=split_at_random(choices))
        failed = ""
        try:
            compile_model(Source(lambda: Random(calls), {"x": X}, torch.float64), config, folder)
        except Exception:
            failed = traceback.format_exc()
    outcome = [failed] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(outcome)
    if outcome[0]:
        return str(outcome[0])
    module, weights = ParallelModule(folder, torch.device("cpu")), dict(plain.named_parameters())
    module.load(lambda name, box: weights[name].detach()[box.slices])
    found = module.accumulate([{"x": X}])
    wrong = [f"loss {found.item()}, wanted {loss.item()}"] * (
        abs(found.item() - loss.item()) > TOLERANCE * abs(loss.item())
    )
    for bucket in module.buckets:
        for part in bucket.owned_parts():
            gradient = weights[part.name].grad
            wanted = (torch.zeros_like(weights[part.name]) if gradient is None else gradient)[part.box.slices]
            mine = bucket.gradient[part.start : part.stop].view(part.box.sizes).double()
            if not torch.allclose(mine, wanted, TOLERANCE, TOLERANCE * float(wanted.abs().max()), equal_nan=True):
                wrong.append(f"gradient of {part.name} {mine.tolist()}, wanted {wanted.tolist()}")
    return "\n".join(wrong)


def fuzz(folder: Path, examples: int, first: int) -> None:
    """On every process: the same modules, one after the other."""
    numbers = iter(range(10**9))

    @seed(first)
    @settings(
        max_examples=examples, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(st.one_of(of_tables(), registered()), min_size=1, max_size=4), st.integers(0, 2**20))
    def check(calls: list[Called], choices: int) -> None:
        code = folder / str(next(numbers))
        found = [""] * DEVICES
        dist.all_gather_object(found, wrong_here(code, calls, choices))
        assert not any(found), f"{calls}, split by {choices} (see {code}):\n" + "\n".join(found)

    check()


def test_random_modules_split_at_random_are_those_of_pytorch(tmp_path):
    first = 1 if "FUZZ" not in os.environ else int.from_bytes(os.urandom(4), "little")
    run(DEVICES, fuzz, tmp_path, EXAMPLES, first)
