"""What a plan costs and why: the figures in plan.json, plan.html, the short version, what would help, and comparisons.

`plan_report` turns a plan into plain values, which go into plan.json. Everything else here reads only those.

    python -m nnscaler.report .nnscaler/llama                     # the short version of a compiled plan
    python -m nnscaler.report .nnscaler/llama .nnscaler/other     # what differs between two
"""

from typing import TYPE_CHECKING

from nnscaler.lazy import lazily

if TYPE_CHECKING:
    from nnscaler.report.comparison import compare
    from nnscaler.report.text import explain
    from nnscaler.report.values import plan_report, read_plan

__all__ = ["compare", "explain", "plan_report", "read_plan"]

__getattr__ = lazily(
    __name__,
    {
        "compare": "nnscaler.report.comparison",
        "explain": "nnscaler.report.text",
        "plan_report": "nnscaler.report.values",
        "read_plan": "nnscaler.report.values",
    },
)
