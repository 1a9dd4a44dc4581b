"""Gradients that travel in bf16: what that loses, beside those in fp32."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nnscaler.cli.trainer import Trainer
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.collectives import start_gradient_scatter
from nnscaler.sums import IN_FP32, GradientSum, gradient_sum
from tests import tiny
from tests.checkpoint.jobs import RANDOM, assert_equal, final, job
from tests.launch import run
from tests.parity import Case

ADDED_IN_FP32, ADDED_ON_THE_WAY = gradient_sum("bf16", 2, 8), gradient_sum("bf16", 16, 8)
ELEMENTS = 2**16


def terms(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(rank)).to(dtype)


def slice_of_sum(sums: GradientSum, dtype: torch.dtype) -> torch.Tensor:
    axis = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    found, work = start_gradient_scatter(terms(axis.rank, dtype).view(-1, 4), axis, 0, sums)
    work.wait()
    return found


def errors() -> list[list[float]]:
    """Of terms in bf16, and in fp32: of each way to add them, the error over the sum, of all elements together."""
    return [errors_in(dtype) for dtype in (torch.bfloat16, torch.float32)]


def errors_in(dtype: torch.dtype) -> list[float]:
    exact = sum(terms(rank, dtype).double() for rank in range(dist.get_world_size())).view(-1, 4)
    wanted = exact.chunk(dist.get_world_size())[dist.get_rank()]
    found = [slice_of_sum(sums, dtype) for sums in (IN_FP32, ADDED_IN_FP32, ADDED_ON_THE_WAY)]
    assert all(one.dtype is torch.float32 for one in found)
    return [float((one - wanted).norm() / wanted.norm()) for one in found]


def test_within_a_node_only_what_is_not_in_bf16_is_rounded():
    assert (ADDED_IN_FP32.collective, ADDED_ON_THE_WAY.collective) == ("all_to_all", "reduce_scatter")
    for of_bf16, of_fp32 in run(2, errors):
        in_fp32, added_in_fp32, added_on_the_way = of_bf16
        assert max(in_fp32, added_in_fp32) < 1e-7, "nothing is lost"
        assert added_on_the_way == pytest.approx(0.0017, rel=0.1)
        in_fp32, added_in_fp32, added_on_the_way = of_fp32
        assert in_fp32 < 1e-7
        assert added_in_fp32 == pytest.approx(0.0017, rel=0.1)
        assert added_on_the_way == pytest.approx(0.0024, rel=0.1)


def around_a_ring(devices: int) -> float:
    """The error of a sum of terms in bf16 that is rounded at every device that it passes."""
    every = [terms(rank, torch.bfloat16) for rank in range(devices)]
    total = every[0]
    for term in every[1:]:
        total = total + term
    exact = sum(term.double() for term in every)
    return float((total - exact).norm() / exact.norm())


@pytest.mark.parametrize(("devices", "error"), [(8, 0.004), (64, 0.01)])
def test_across_nodes_the_error_is_as_the_flags_help_says(devices, error):
    assert around_a_ring(devices) == pytest.approx(error, rel=0.1)


def train_with_both(folder: Path, case: Case) -> None:
    for index, dtype in enumerate(("fp32", "bf16")):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)  # where they meet, each time anew
        args = job(case, folder, 2, f"{case.name}-{dtype}", precision="bf16")
        Trainer(replace(args, compute=replace(args.compute, grad_reduce_dtype=dtype))).run()


@pytest.mark.parametrize("case", [Case(1, 2), Case(2, 2)], ids=["copies", "split"])
def test_two_devices_train_to_the_same_bits(case, tmp_path):
    """Each gradient is in bf16, and the sum of two terms in fp32 does not depend on their order."""
    tiny.write_hardware(tmp_path)
    tiny.write_dataset(tmp_path / "data")
    run(2, train_with_both, tmp_path, case, init=False)
    found, wanted = (final(tmp_path, f"{case.name}-{dtype}") for dtype in ("bf16", "fp32"))
    random = [name for name in wanted if name.startswith(RANDOM)]
    assert_equal(without(found, random), without(wanted, random))
    plan = json.loads((tmp_path / "code" / f"{case.name}-bf16" / "plan.json").read_text())
    assert plan["gradient_sum"] == {"collective": "all_to_all", "travels_as": "bfloat16"}


def without(tensors: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}
