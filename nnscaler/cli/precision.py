"""The precision of a run that does not ask for one: what its device is fast in."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import torch

from nnscaler.cli.config import TrainerArgs
from nnscaler.kernels import are_slow

logger = logging.getLogger(__name__)


def with_precision(args: TrainerArgs) -> TrainerArgs:
    """The same arguments, with a precision that is not "auto". A choice is logged.

    It is the one that is asked for. "auto" becomes bf16 in a plan for other hardware, and otherwise what this device is
    fast in.
    """
    if args.precision != "auto":
        return args
    if args.run_mode == "compile" and args.compute.hardware is not None:
        precision, reason = "bf16", f"the plan is for {args.compute.find_hardware().name}"
    else:
        if torch.cuda.is_available():
            device, fast = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            device, fast = "this CPU", not are_slow(torch.device("cpu"), torch.bfloat16)
        precision = "bf16" if fast else "fp32"
        reason = f"{device} {'is fast' if fast else 'has no fast arithmetic'} in bf16"
    if os.environ.get("RANK", "0") == "0":
        logger.info("precision %s: %s (--precision chooses)", precision, reason)
    return replace(args, precision=precision)
