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
from nnscaler.models.causal_lm import CausalLM, prepare_config
from nnscaler.trace import build_on_meta, trace
from tests import parity, tiny  # noqa: F401


def trace_once() -> None:
    config = tiny.config()
    prepare_config(config, tiny.LENGTH, "auto")
    model, buffers = build_on_meta(lambda: CausalLM(config))
    tokens = torch.zeros(1, tiny.LENGTH, dtype=torch.int64)
    trace(model, {"input_ids": tokens, "labels": tokens}, buffers)


def compile_once() -> None:
    """Without a backward and tqdm's monitor, which are threads: a process that has any must not be forked."""
    with patch.object(tqdm, "monitor_interval", 0):
        torch.compile(lambda x: (x @ x).relu(), backend="aot_eager")(torch.ones(2, 2, requires_grad=True))
    torch.compiler.reset()


trace_once()
compile_once()
gc.collect()
gc.freeze()  # their own collections leave alone what is here
