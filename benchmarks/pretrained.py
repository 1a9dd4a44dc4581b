"""A pretrained model goes in, is trained for a step, and comes out, at its own width: Qwen3-0.6B with random weights.

    python benchmarks/pretrained.py

Checks keys, shapes, types, files, fields, the step's loss and that plain transformers loads the result (see
tests/models/published.py), and writes benchmarks/results/pretrained.json. Takes 12 GB of memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import RESULTS
from tests.launch import run
from tests.models.published import QWEN3, check, shapes_of, train_and_export, write_published


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_published(folder / "model", QWEN3)
        # In a process of its own, whose memory is free afterwards.
        (loss,) = run(1, train_and_export, folder, 1, QWEN3["vocab_size"], init=False, timeout=3600)
        check(folder, loss)
    shapes = shapes_of(QWEN3)
    found = {"model": "Qwen3-0.6B", "keys": len(shapes), "loss": loss, "result": "equal"}
    (RESULTS / "pretrained.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()
