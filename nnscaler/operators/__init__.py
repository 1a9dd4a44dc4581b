"""What the compiler knows of operators: importing this package fills the table."""

from nnscaler.operators import attention, index, matmul, pointwise, reduce, view
from nnscaler.operators.registry import Operator, bind, operator_of, register_op, registered

__all__ = [
    "Operator",
    "attention",
    "bind",
    "index",
    "matmul",
    "operator_of",
    "pointwise",
    "reduce",
    "register_op",
    "registered",
    "view",
]
