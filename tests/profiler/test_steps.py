"""Where a step's time went, from the runs of its kernels."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nnscaler.cli.config import DatasetConfig, LogConfig, ModelConfig, TrainerArgs
from nnscaler.cli.trainer import Trainer
from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError
from nnscaler.profiler.steps import (
    LEAST,
    WARM_UP,
    KernelRun,
    StepProfiler,
    covered,
    kernel_category,
    kernel_runs,
    milliseconds_by_category,
    step_table,
)
from tests import tiny
from tests.parity import Case, arguments

GEMM, ATTENTION, NCCL, COPY = "nvjet_sm90_tst_128x256", "flash_fwd_kernel", "ncclDevKernel_AllGather", "copy_kernel"
MARK, ADAM = "at::cuda::(anonymous namespace)::spin_kernel(long)", "fused_adam_kernel"
FROM_HOST, TO_HOST = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pinned)"


def test_communication_is_hidden_where_another_kernel_runs():
    kernels = [
        KernelRun(GEMM, 10.0, 14.0),
        KernelRun(NCCL, 13.0, 17.0),  # one millisecond beside the product, one beside attention
        KernelRun(ATTENTION, 16.0, 20.0),
        KernelRun(COPY, 23.0, 24.0),
    ]
    assert milliseconds_by_category(kernels) == {
        "matmul": 4.0,
        "attention": 4.0,
        "memory-bound": 1.0,
        "optimizer": 0.0,
        "communication exposed": 2.0,
        "copies to the host exposed": 0.0,
        "idle": 3.0,
        "whole": 14.0,
        "communication hidden": 2.0,
        "copies to the host hidden": 0.0,
    }


def test_copies_to_the_host_are_hidden_where_anything_else_runs_and_no_work_of_the_device():
    """Of 9 ms of copies, 2 run beside the product and 1 beside communication alone, which is exposed nevertheless."""
    kernels = [
        KernelRun(GEMM, 0.0, 4.0),
        KernelRun(FROM_HOST, 2.0, 6.0),
        KernelRun(NCCL, 5.0, 7.0),
        KernelRun(TO_HOST, 8.0, 13.0),
    ]
    assert milliseconds_by_category(kernels) == {
        "matmul": 4.0,
        "attention": 0.0,
        "memory-bound": 0.0,
        "optimizer": 0.0,
        "communication exposed": 2.0,
        "copies to the host exposed": 6.0,
        "idle": 1.0,
        "whole": 13.0,
        "communication hidden": 0.0,
        "copies to the host hidden": 3.0,
    }


def test_time_is_counted_once_where_kernels_overlap():
    spans = [(5.0, 6.0), (0.0, 4.0), (1.0, 2.0), (3.0, 4.5)]  # two of them while the longest runs, one beyond its end
    assert covered([KernelRun(COPY, *span) for span in spans]) == pytest.approx(5.5)
    assert covered([]) == 0.0


def test_without_kernels_of_a_gpu_there_is_a_sentence_and_no_table(tmp_path):
    with StepProfiler(tmp_path, {"matmul": 0.01673}) as profiler:
        for _ in range(LEAST):
            profiler.step()
    text = (tmp_path / "profile.txt").read_text()
    assert text.startswith("no kernel ran on a GPU")
    assert not re.search(r"\d", text), "neither zeros nor the plan's figures beside none"


@pytest.fixture
def trace(tmp_path):
    """Writes a trace in which these kernels ran: (name, begin, end), in milliseconds; returns its path."""

    def write(*kernels: tuple[str, float, float], others: Sequence[dict[str, Any]] = ()) -> Path:
        path = tmp_path / "trace.json"
        path.write_text(json.dumps({"traceEvents": [*(event(*each) for each in kernels), *others], "traceName": "x"}))
        return path

    return write


def event(name: str, start: float, end: float, kind: str | None = None) -> dict[str, Any]:
    kind = kind or ("gpu_memcpy" if name in (FROM_HOST, TO_HOST) else "kernel")
    args = {"stream": 7, "cat": "of no event"}
    return {"ph": "X", "cat": kind, "name": name, "ts": 1e3 * start, "dur": 1e3 * (end - start), "args": args}


def test_the_counted_step_is_between_its_marks(trace):
    """The update of the step before runs into it, and its own begins before its end."""
    kernels = [
        (GEMM, 0.0, 9.0), (MARK, 10.0, 10.5), (ADAM, 9.0, 12.5), (GEMM, 11.5, 15.0), (MARK, 20.5, 21.0),
        (TO_HOST, 20.0, 23.0), (GEMM, 22.0, 30.0),
    ]  # fmt: skip
    assert sorted(kernel_runs(trace(*kernels))) == sorted([
        KernelRun(ADAM, 10.5, 12.5), KernelRun(GEMM, 11.5, 15.0), KernelRun(TO_HOST, 20.0, 20.5),
    ])  # fmt: skip


def test_the_table_has_what_was_planned_beside_what_ran(trace):
    """The plan's registered operators are products in it."""
    ran = trace((MARK, -1.0, 0.0), (GEMM, 0.0, 6.0), (ATTENTION, 6.0, 10.0), (GEMM, 20.0, 24.0), (MARK, 24.0, 25.0))
    predicted = {"matmul": 0.008, "attention": 0.004, "linear_loss": 0.002, "convolution": 0.001, "recompute": 0.006,
                 "memory-bound": 0.002, "casts of master weights": 0.001,
                 "copies to the host exposed": 0.0005}  # fmt: skip
    text = step_table(kernel_runs(ran), predicted)
    rows = {line[:26].strip(): line[26:].split() for line in text.partition("\n\n")[0].splitlines()[1:]}
    assert rows["matmul"] == ["10.00", "11.00"]
    assert rows["attention"] == ["4.00", "4.00"]
    assert rows["recompute"] == ["6.00"], "which no kernel says of itself"
    assert rows["idle"] == ["10.00"]
    assert rows["memory-bound"] == ["0.00", "3.00"]
    assert rows["copies to the host exposed"] == ["0.00", "0.50"]
    assert rows["whole"] == ["24.00", "24.50"]
    assert [line.split() for line in text.splitlines()[-2:]] == [["10.00", "2", GEMM], ["4.00", "1", ATTENTION]]


def test_the_kernels_that_take_longest_come_first_and_only_a_gpu_s_count(trace):
    of_others = [
        event("aten::mm", 0.0, 90.0, "cpu_op"), event("step 3", 0.0, 99.0, "gpu_user_annotation"),
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]  # fmt: skip
    ran = trace(
        (MARK, -1.0, 0.0), (GEMM, 0.0, 2.0), (COPY, 0.0, 3.0), (NCCL, 0.0, 1.0), (COPY, 0.0, 3.0), (MARK, 3.0, 4.0),
        others=of_others,
    )  # fmt: skip
    text = step_table(kernel_runs(ran), {}, longest=2)
    assert [line.split() for line in text.partition("\n\n")[2].splitlines()[1:]] == [
        ["6.00", "2", COPY], ["2.00", "1", GEMM]
    ]  # fmt: skip
    assert re.search(r"^whole +3\.00", text, re.MULTILINE)


@pytest.mark.parametrize(("category", "names"), [
    ("communication", ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "ncclKernel_SendRecv"]),
    ("attention", ["flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "fmha_cutlassF_bf16_aligned", "_attention_rows",
                   "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"]),
    ("matmul", ["ampere_bf16_s16816gemm_128x128", "nvjet_tst_128x256", "sm80_xmma_fprop", "cutlass::Kernel2",
                "cublasLt_mainloop", "splitKreduce_kernel"]),
    ("optimizer", ["fused_adam_kernel", "multi_tensor_apply_kernel", "_foreach_norm_kernel", "add_gradient_kernel"]),
    ("memory-bound", ["triton_poi_fused_mul_silu_0", "vectorized_elementwise_kernel",
                      "Memcpy DtoD (Device -> Device)"]),
    ("copies to the host", [FROM_HOST, TO_HOST]),
])  # fmt: skip
def test_kernels_are_told_apart_by_their_names(category, names):
    assert {name: kernel_category(name) for name in names} == dict.fromkeys(names, category)


@pytest.mark.parametrize("steps", [1, WARM_UP, LEAST - 1, LEAST])
def test_a_run_that_ends_early_leaves_no_profiler_running(steps, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "nnscaler"), StepProfiler(tmp_path / "prof", {}) as profiler:
        for index in range(steps):
            profiler.step()
            assert torch.autograd._profiler_enabled() == (WARM_UP <= index + 1 < LEAST)
    assert not torch.autograd._profiler_enabled()
    assert (tmp_path / "prof").exists() == (steps == LEAST)
    assert [record.getMessage() for record in caplog.records] == (
        [] if steps == LEAST else [f"no profile is written: this run took {steps} of the 5 steps that it needs"]
    )


@pytest.mark.parametrize("written", [None, "", '{"traceEv'])
def test_a_full_disk_costs_the_profile_alone(written, tmp_path, monkeypatch, caplog):
    """The library tells nobody that it could not write a trace, or not all of it. None: it could, and we cannot."""

    def write(self: object, path: str) -> None:
        Path(path).write_text(written)

    if written is None:
        (tmp_path / "profile.txt").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", write)
    with caplog.at_level(logging.WARNING, "nnscaler"), StepProfiler(tmp_path, {}) as profiler:
        for _ in range(LEAST):
            profiler.step()
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        f"no profile is written to {tmp_path}"
    ]


def test_too_few_steps_for_a_profile_are_refused(tmp_path):
    def run(steps: int, profile: bool = True) -> TrainerArgs:
        log = LogConfig(profile=tmp_path if profile else None)
        model, data = ModelConfig(make=lambda: None), DatasetConfig(sequence_length=8)
        return TrainerArgs(name="x", model=model, compute=ComputeConfig(), dataset=data, log=log, max_train_steps=steps)

    run(5)
    run(4, profile=False)
    with pytest.raises(UserError, match="max_train_steps is 4; with profile it must be at least 5"):
        run(4)


def test_a_training_run_of_fewer_steps_ends_as_any_other(tmp_path):
    tiny.write_hardware(tmp_path)
    tiny.write_dataset(tmp_path / "data")
    args = arguments(Case(1, 1, accumulation=4), tmp_path)
    log = dataclasses.replace(args.log, profile=tmp_path / "prof")
    Trainer(dataclasses.replace(args, log=log, max_train_steps=None, num_train_epochs=16 / 80)).run()
    assert not torch.autograd._profiler_enabled()
    assert not (tmp_path / "prof").exists()
