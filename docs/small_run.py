"""Runs the commands of docs/how-a-plan-is-found.rst below ./small_run, and puts what they really say into the page.

python docs/small_run.py    # a minute or two on two cores; needs no GPU and no network
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-a-plan-is-found.rst"
FOLDER = ROOT / "small_run"
COMPILED = FOLDER / "compiled" / "small"
WIDTH = 150  # of a line in the page


def run(command: str) -> str:
    """What a command says, on both streams."""
    words = shlex.split(command)
    start = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *start, *words[1:]], cwd=ROOT, env=environment, text=True, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout


def between(text: str, begin: str, end: str) -> str:
    """The lines from the first that begins with `begin` to the first after it that begins with `end`, without that."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(begin))
    last = next((i for i, line in enumerate(lines) if i > first and line.startswith(end)), len(lines))
    return "\n".join(lines[first:last]).rstrip()


def rounded(line: str) -> str:
    """A line of metrics.jsonl with numbers that are short enough to read."""
    return json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in json.loads(line).items()})


def attention_of_plan() -> str:
    """What plan.json says of the attention of a layer."""
    units = json.loads((COMPILED / "plan.json").read_text())["costs"]["llama_decoder_layer"]["units"]
    return json.dumps(next(unit for unit in units if unit.get("name") == "attention"), indent=1)


def excerpts(said: list[str]) -> dict[str, str]:
    """Name -> text. `said`: by the commands of the page, in order."""
    graph = (COMPILED / "graph.txt").read_text()
    code = (COMPILED / "gencode_stage0.py").read_text()
    layer = between(graph, "block llama_decoder_layer", "block none")
    assert "collectives.all_gather(" in code, "the page explains another plan: change its words"
    assert "collectives.all_to_all(" in code, "the page explains another plan: change its words"
    return {
        "layers": between(graph, "  # model.model.layers.0", "  # model.model.norm"),
        "attention": between(layer, "    attention:", "  # .  "),
        "plan": said[1].rstrip(),
        "unit": attention_of_plan(),
        "code": between(code, "def llama_decoder_layer(", "@region"),
        "run": re.sub(r"\n\n+", "\n", re.sub(r"training: .*?\d+/\d+ \[.*?\]", "", said[2])).strip(),
        "metrics": "\n".join(map(rounded, (FOLDER / "runs" / "small" / "metrics.jsonl").read_text().splitlines())),
        "checkpoints": said[3].partition("\ntensor")[0].rstrip(),
    }


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    text = PAGE.read_text()
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    data = next(block for block in blocks if "save_to_disk" in block)
    run(shlex.join(["python", "-c", re.sub(r"^    ", "", data, flags=re.MULTILINE)]))
    found = re.findall(r"^\.\. code-block:: bash\n\n((?:    .*\n)+)", text, re.MULTILINE)
    commands = [command.replace("\\\n", " ").strip() for command in found if "docs/small_run.py" not in command]
    said = [run(command) for command in commands]
    for name, excerpt in excerpts(said).items():
        lines = [line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..." for line in excerpt.splitlines()]
        shown = "\n".join(f"    {line}".rstrip() for line in lines)
        block = (
            f".. begin {name}\n\n.. code-block:: {'python' if name == 'code' else 'text'}\n\n{shown}\n\n.. end {name}\n"
        )
        pattern = rf"\.\. begin {name}\n.*?\.\. end {name}\n"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)  # type: ignore[misc]
        assert count == 1, name
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
