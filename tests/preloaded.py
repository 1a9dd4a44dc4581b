"""What the processes that tests start have from the beginning: they are forked from one that has imported this.

It has also traced and compiled: what torch imports and prepares when it first does so, they have as well.
"""

from __future__ import annotations

import gc
from unittest.mock import patch

import pytest  # noqa: F401
import torch
import torch.distributed
from tqdm import tqdm

import nnscaler.cli.loop  # noqa: F401
from nnscaler.data.training import with_labels
from nnscaler.models.causal_lm import IGNORED, CausalLM, prepare_config
from nnscaler.source import Source
from nnscaler.trace import trace
from tests import parity, tiny


def trace_one() -> None:
    config = tiny.config(**parity.Case(1, 1).model)
    prepare_config(config, tiny.LENGTH, "auto")
    tokens = torch.empty((1, tiny.LENGTH), dtype=torch.int64, device="meta")
    source = Source(lambda: CausalLM(config), with_labels(tokens, IGNORED), torch.float32, parity.SEED)
    model, buffers = source.build()
    trace(model, source.inputs, buffers, "reuse_cache", source.seed)


def begin_autograd() -> None:
    """Before there are fake devices: its first backward starts a thread for each device, also for eight of these (torch
    2.11). A process that has any thread must not be forked."""
    torch.ones((), requires_grad=True).backward()


def compile_one() -> None:
    """Without tqdm's monitor, which is a thread."""
    with patch.object(tqdm, "monitor_interval", 0):
        torch.compile(lambda x: (x @ x).relu(), backend="aot_eager")(torch.ones(2, 2, requires_grad=True))
    torch.compiler.reset()


begin_autograd()
trace_one()
compile_one()
gc.collect()
gc.freeze()  # their own collections leave alone what is here
