"""Trains large models over many devices: traces, plans, generates code, and runs it."""

from nnscaler.compiler import ComputeConfig, Source, compile_model
from nnscaler.errors import UserError
from nnscaler.operators import register_op

__all__ = ["ComputeConfig", "Source", "UserError", "compile_model", "register_op"]
