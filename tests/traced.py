"""Each tiny model is traced once in a process, whatever number of cases compiles it: a trace is always the same."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnscaler.graph import Graph
from nnscaler.models.causal_lm import CausalLM
from nnscaler.trace import trace

_known: dict[str, bytes] = {}


def traced_once(model: CausalLM, inputs: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *how: Any) -> Graph:
    """What `nnscaler.trace.trace` gives for what `tests.parity.arguments` compiles; the caller may change it."""
    parameters = model.named_parameters(remove_duplicate=False)
    key = repr((
        model, model.model.config, model.linear_loss and model.linear_loss.__name__, model.document_length,
        [(name, one.dtype, one.requires_grad) for name, one in parameters],
        [(name, one.shape) for name, one in inputs.items()], how,
    ))  # fmt: skip
    if key not in _known:
        _known[key] = pickle.dumps(trace(model, inputs, buffers, *how))
    graph: Graph = pickle.loads(_known[key])
    return graph
