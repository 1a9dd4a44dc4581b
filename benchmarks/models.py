"""Trains tiny models of many architectures on two and four processes, from safetensors, and exports them again. Losses,
weights and keys are compared with what plain transformers makes of the same in one process, in fp32.

    python benchmarks/models.py [name ...]

Prints a line for each, and writes it into benchmarks/results/models.json, from which readme.py makes README's table.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS
from nnscaler.errors import UserError
from tests.launch import run
from tests.models.architectures import ARCHITECTURES, OTHERS
from tests.models.matrix import check, prepare, train_all

DEVICES = (2, 4)
RESULT = RESULTS / "models.json"


def verdict(name: str, devices: int, folder: Path) -> str:
    """`equal`, or why not."""
    try:
        run(devices, train_all, [name], folder, init=False)
        check(name, devices, folder)
    except Exception as error:  # whatever it is, it is what is to be known of the architecture
        lines = [line for line in str(error).splitlines() if line.strip()]
        last = lines[-1].strip() if lines else type(error).__name__
        return last.replace(f"{UserError.__module__}.UserError", "refused")
    return "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*ARCHITECTURES, *OTHERS], help="architectures (default: all)")
    names = parser.parse_args().names
    logging.disable(logging.WARNING)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                prepare(Path(folder), [name])
            except Exception as error:  # transformers does not make such a model
                found = {"model": f"{type(error).__name__}: {error}"}
            else:
                found = {str(devices): verdict(name, devices, Path(folder)) for devices in DEVICES}
        print(f"{name:14} {'; '.join(f'{key}: {value}' for key, value in found.items())}", flush=True)
        known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.write_text(json.dumps({**known, name: found}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
