"""The states of the random number generators, as tensors. A checkpoint has those of every rank.

A rank that was there when the checkpoint was made continues its own streams. If there are more processes now, the new
ranks begin streams of their own, from the seed, the step, and their rank.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

RANDOM = "random."  # begins the names of these tensors in a checkpoint: random.<generator>.<rank>


def random_states(device: torch.device) -> dict[str, Any]:
    """Generator -> its state as it gives it: `torch`, `python`, `numpy`, and `device` on a GPU. Takes microseconds."""
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def as_tensors(states: dict[str, Any]) -> dict[str, Tensor]:
    """The states that `random_states` gave, as uint8 [n]."""
    kind, keys, *rest = states["numpy"]
    numpy_state = _as_bytes([kind, keys.tolist(), *rest])
    return {**states, "python": _as_bytes(states["python"]), "numpy": numpy_state}


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Continues the streams that `as_tensors` gave; those that are not in `states` are left alone."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        version, internal, gauss = _from_bytes(states["python"])
        random.setstate((version, tuple(internal), gauss))
    if "numpy" in states:
        kind, keys, *rest = _from_bytes(states["numpy"])
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "device" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)


def new_random_states(seed: int, step: int, rank: int) -> None:
    """Begins streams for a rank that the checkpoint has none of."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    start = int.from_bytes(digest[:4], "big")
    torch.manual_seed(start)
    random.seed(start)
    np.random.seed(start)


def _as_bytes(state: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> list[Any]:
    return json.loads(bytes(tensor.tolist()))
