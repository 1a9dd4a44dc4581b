"""What compiling costs: little memory, no time for layers that repeat, and no import that only training needs."""

import os
import subprocess
import sys
import time

import torch

from nnscaler import Source
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.trace import trace
from tests import tiny

COMPILE = """
import resource, sys
sys.argv = ["train.py", *sys.argv[1:]]
import train
train.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(*sys.modules)
"""


def test_compiling_8b_at_128k_takes_little_memory_and_imports_nothing_for_training(tmp_path):
    flags = [
        "--run_mode", "compile", "--model_id", "meta-llama/Meta-Llama-3-8B", "--sequence_length", "131072",
        "--plan_ngpus", "8", "--runtime_ngpus", "8", "--enable_chunk_loss", "--hardware", "h100",
        "--gen_savedir", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, modules = done.stdout.strip().splitlines()[-2:]
    assert (tmp_path / "llama" / "gencode_stage0.py").exists()
    assert int(peak) < 2 * 2**30
    assert {"datasets", "tensorboard"} & set(modules.split()) == set()


def seconds_to_trace(layers: int, strategy: str) -> float:
    """CPU time, so that what else runs on the machine matters little."""
    config = tiny.config(num_hidden_layers=layers)
    prepare_config(config, tiny.LENGTH, "auto")
    tokens = torch.zeros(1, tiny.LENGTH, dtype=torch.long)
    source = Source(lambda: CausalLM(config), {"input_ids": tokens, "labels": tokens}, torch.float32)
    model, buffers = source.build()
    started = time.process_time()
    trace(model, source.inputs, buffers, strategy)
    return time.process_time() - started


def test_layers_that_repeat_take_a_fraction_of_the_time_of_tracing_each():
    """Of three times the shortest: what else runs may take of the processor's caches meanwhile."""
    seconds_to_trace(2, "reuse_cache")  # imports, and caches of operators
    limit = 0.5 * seconds_to_trace(24, "meta")
    assert any(seconds_to_trace(24, "reuse_cache") < limit for _ in range(3))
