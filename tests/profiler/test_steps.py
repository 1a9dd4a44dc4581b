"""Where a step's time went, from the runs of its kernels."""

from __future__ import annotations

import pytest

from nnscaler.profiler.steps import Kernel, covered, milliseconds_by_category

GEMM, ATTENTION, NCCL, COPY = "nvjet_sm90_tst_128x256", "flash_fwd_kernel", "ncclDevKernel_AllGather", "copy_kernel"


def test_communication_is_hidden_where_another_kernel_runs():
    kernels = [
        Kernel(GEMM, 10.0, 14.0),
        Kernel(NCCL, 13.0, 17.0),  # one millisecond beside the product, one beside attention
        Kernel(ATTENTION, 16.0, 20.0),
        Kernel(COPY, 23.0, 24.0),
    ]
    assert milliseconds_by_category(kernels) == {
        "matmul": 4.0,
        "attention": 4.0,
        "memory-bound": 1.0,
        "optimizer": 0.0,
        "communication exposed": 2.0,
        "idle": 3.0,
        "whole": 14.0,
        "communication hidden": 2.0,
    }


def test_time_is_counted_once_where_kernels_overlap():
    spans = [(5.0, 6.0), (0.0, 4.0), (1.0, 2.0), (3.0, 4.5)]  # two of them while the longest runs, one beyond its end
    assert covered([Kernel(COPY, *span) for span in spans]) == pytest.approx(5.5)
    assert covered([]) == 0.0
