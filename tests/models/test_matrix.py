"""Architectures in parallel: trained, exported and read again they are what plain transformers makes of them.

All architectures: benchmarks/models.py.
"""

from __future__ import annotations

import pytest

from tests.launch import run
from tests.models.matrix import check, prepare, train_all

# One for each thing that others have too: windows beside full attention, soft caps, LayerNorm, biases, sinks, ALiBi.
SOME = {2: ["gemma2", "gpt2", "mistral"], 4: ["gemma3_text", "phi"]}


@pytest.mark.parametrize("devices", SOME)
def test_trained_in_parallel_and_exported(devices, tmp_path):
    prepare(tmp_path, SOME[devices])
    run(devices, train_all, SOME[devices], tmp_path, init=False)
    for name in SOME[devices]:
        check(name, devices, tmp_path)
