"""What the compiler knows about operators. Importing this package fills the table of them."""

from nnscaler.operators import (
    attention,
    convolution,
    copies,
    experts,
    index,
    loss,
    matmul,
    own_backward,
    pointwise,
    pooling,
    random,
    reduce,
    scans,
    view,
)
from nnscaler.operators.register import register_op
from nnscaler.operators.registry import Operator, arguments, bind, operator_of, registered, spell
from nnscaler.operators.verify import verify_op

__all__ = [
    "Operator",
    "arguments",
    "attention",
    "bind",
    "convolution",
    "copies",
    "experts",
    "index",
    "loss",
    "matmul",
    "operator_of",
    "own_backward",
    "pointwise",
    "pooling",
    "random",
    "reduce",
    "register_op",
    "registered",
    "scans",
    "spell",
    "verify_op",
    "view",
]
