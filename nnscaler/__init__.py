"""Trains large models over many devices: traces, plans, generates code, and runs it."""

from typing import TYPE_CHECKING

from nnscaler.errors import UserError
from nnscaler.lazy import lazily

if TYPE_CHECKING:
    from nnscaler.compiler import Source, compile_model
    from nnscaler.config import ComputeConfig
    from nnscaler.operators import register_op

__all__ = ["ComputeConfig", "Source", "UserError", "compile_model", "register_op"]

__getattr__ = lazily(
    __name__,
    {
        "ComputeConfig": "nnscaler.config",
        "Source": "nnscaler.compiler",
        "compile_model": "nnscaler.compiler",
        "register_op": "nnscaler.operators",
    },
)
