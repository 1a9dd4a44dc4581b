"""Each tiny model is traced once, whatever number of cases and processes compiles it: a trace is always the same."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnscaler.graph import Graph
from nnscaler.models.causal_lm import CausalLM
from nnscaler.trace import trace


def traced_once(model: CausalLM, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *how: Any) -> Graph:
    """What `nnscaler.trace.trace` gives for what `tests.parity.arguments` compiles; the caller may change it."""
    parameters = model.named_parameters(remove_duplicate=False)
    key = repr((
        model, model.model.config, model.linear_loss and model.linear_loss.__name__, model.document_length,
        [(name, one.dtype, one.requires_grad) for name, one in parameters],
        [(name, one.shape) for name, one in inputs.items()], how,
    ))  # fmt: skip
    known = Path(os.environ["FOLDER_OF_TRACES"], hashlib.sha256(key.encode()).hexdigest())
    if not known.exists():
        written = known.with_suffix(f".{os.getpid()}")
        written.write_bytes(pickle.dumps(trace(model, inputs, buffers, *how)))
        written.replace(known)  # as a whole: others may look for it at this moment
    graph: Graph = pickle.loads(known.read_bytes())
    return graph
