"""Products in 16 bits on a CPU without instructions for them, as this one is by two variables."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnscaler.hardware.spec import detect_hardware
from nnscaler.kernels import products

PLAIN_CPU = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

STEP = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from torch.utils._python_dispatch import TorchDispatchMode
from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from nnscaler.cli.config import CheckpointConfig, DatasetConfig, LogConfig, LRSchedulerConfig, ModelConfig, TrainerArgs
from nnscaler.cli.precision import with_precision
from nnscaler.cli.trainer import Trainer
from nnscaler.compiler import ComputeConfig, compile_model
from nnscaler.kernels import products
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.runtime.module import ParallelModule
from tests import tiny

folder = Path(sys.argv[1])
config = tiny.config()
prepare_config(config, 32, "auto")
def args(precision, hardware=None):
    return TrainerArgs(name="x", model=ModelConfig(make=lambda: CausalLM(config, chunk_linear_cross_entropy)),
        compute=ComputeConfig(hardware=hardware), dataset=DatasetConfig(None, 32), run_mode="compile",
        precision=precision, gen_savedir=folder)
print(with_precision(args("auto")).precision, with_precision(args("auto", "h100")).precision)

reached = []  # the kernels of PyTorch that are given 16 bits
kernel_of = torch.library.get_kernel
class Watched:
    def __init__(self, name, key):
        self.name, self.kernel = name, kernel_of(name, key)
    def call_boxed(self, keys, *args, **kwargs):
        reached.extend((self.name, x.dtype) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        return self.kernel.call_boxed(keys, *args, **kwargs)
torch.library.get_kernel = Watched

Trainer(args("bf16")).run()
module = ParallelModule(folder / "x", torch.device("cpu"))
module.load(lambda name, box: torch.full(box.sizes, 0.02))
tokens = torch.arange(32).view(1, 32)
loss = module.accumulate([{"input_ids": tokens, "labels": tokens}])
assert loss.isfinite() and all(bucket.gradient.isfinite().all() for bucket in module.buckets)
print(len(reached) > 20, {dtype for _, dtype in reached})
"""


def test_a_step_in_bf16_multiplies_in_fp32(tmp_path):
    command = [sys.executable, "-c", STEP, str(tmp_path)]
    path = os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, **PLAIN_CPU, "PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["fp32 bf16", "True {torch.float32}"]


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm"])
@pytest.mark.parametrize("form", ["", ".out", "_"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_form_of_a_product_is_that_of_fp32_rounded(name, form, dtype, monkeypatch):
    if f"{name}{form}" not in products._PRODUCTS:
        pytest.skip("there is no such form")
    monkeypatch.setattr(products, "_slow_types", lambda: {torch.bfloat16, torch.float16})
    batch = (2,) if "bmm" in name else ()
    left, right = torch.randn(*batch, 5, 7).to(dtype), torch.randn(*batch, 7, 3).to(dtype)
    added = torch.randn(*batch, 5, 3).to(dtype)
    args, kwargs, wanted = (left, right), {}, left.double() @ right.double()
    if "add" in name:
        args, kwargs, wanted = (added.clone(), *args), {"beta": 0.5, "alpha": 2}, 0.5 * added.double() + 2 * wanted
    out = torch.empty(0, dtype=dtype)
    found = products._widened(f"{name}{form}")(None, *args, **kwargs, **({"out": out} if form == ".out" else {}))
    assert found.dtype == dtype
    assert (found is out) == (form == ".out")
    assert (found is args[0]) == (form == "_")
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_the_planner_knows_what_this_cpu_is_slow_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "_slow_types", frozenset)
    fast = detect_hardware().flops
    monkeypatch.setattr(products, "_slow_types", lambda: {torch.bfloat16})
    slow = detect_hardware().flops
    assert slow["bfloat16"] == 0.8 * slow["float32"] < fast["bfloat16"]
    assert slow["float16"] == fast["float16"]


@pytest.mark.parametrize(
    ("known", "slow"),
    [
        ("bf16 fp16", set()),
        ("bf16", {torch.float16}),
        ("fp16", {torch.bfloat16}),
        ("", {torch.bfloat16, torch.float16}),
    ],
)
def test_slow_is_what_onednn_cannot_multiply_on_a_cpu(known, slow, monkeypatch):
    """Without a word of oneDNN both are."""
    says = {f"_is_mkldnn_{name}_supported": lambda: True for name in known.split()}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**says))
    found = products._slow_types.__wrapped__()
    assert found == slow
    monkeypatch.setattr(products, "_slow_types", lambda: found)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert products.are_slow(torch.device("cpu"), dtype) == (dtype in slow)
        assert not products.are_slow(torch.device("cuda"), dtype)
