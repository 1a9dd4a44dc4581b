"""Explains a compiled plan in a few lines, or says what differs between two.

python -m nnscaler.report .nnscaler/llama
python -m nnscaler.report .nnscaler/llama .nnscaler/other
"""

from __future__ import annotations

import sys
from pathlib import Path

from nnscaler.command import ArgumentParser, run


def main() -> None:
    parser = ArgumentParser(prog="nnscaler.report", description=__doc__)
    parser.add_argument("plan", type=Path, help="compiled directory, or plan.json")
    parser.add_argument("other", type=Path, nargs="?", help="another, to compare with the first")
    options = parser.parse_args()
    from nnscaler.report import compare, explain, read_plan  # torch takes seconds: help does not wait for it

    plan = read_plan(options.plan)
    text = explain(plan) if options.other is None else compare(plan, read_plan(options.other))
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    run(main)
