"""Trains large models on many devices: traces a model, plans how to divide it, generates code, and runs that."""

from typing import TYPE_CHECKING

from nnscaler.errors import UserError
from nnscaler.lazy import lazily

if TYPE_CHECKING:
    from nnscaler.compiler import Source, compile_model
    from nnscaler.config import ComputeConfig, OptimizerConfig
    from nnscaler.operators import register_op, verify_op
    from nnscaler.parallel import parallelize
    from nnscaler.plain import same_dropout

__all__ = [
    "ComputeConfig",
    "OptimizerConfig",
    "Source",
    "UserError",
    "compile_model",
    "parallelize",
    "register_op",
    "same_dropout",
    "verify_op",
]

__getattr__ = lazily(
    __name__,
    {
        "ComputeConfig": "nnscaler.config",
        "OptimizerConfig": "nnscaler.config",
        "Source": "nnscaler.compiler",
        "compile_model": "nnscaler.compiler",
        "parallelize": "nnscaler.parallel",
        "register_op": "nnscaler.operators",
        "same_dropout": "nnscaler.plain",
        "verify_op": "nnscaler.operators",
    },
)
