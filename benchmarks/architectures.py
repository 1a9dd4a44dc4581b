"""What the compiler makes of tiny models of many architectures, beside plain transformers: loss and gradients in fp32.

    python benchmarks/architectures.py [--eager] [name ...]

Prints a line an architecture and loss: SAME, REFUSED and why, WRONG and where, or CRASH.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models.architectures import ARCHITECTURES, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES), help="architectures (default: all)")
    parser.add_argument("--eager", action="store_true", help="attention as the model writes it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        for chunked in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    said = compare(name, chunked, Path(folder), "eager" if options.eager else "auto")
                except Exception as error:  # a defect of ours, which is what this program looks for
                    said = f"CRASH {type(error).__name__}: {str(error).strip()[:300]}"
            print(f"{name:12} {'chunked' if chunked else 'plain':8} {said}", flush=True)


if __name__ == "__main__":
    main()
