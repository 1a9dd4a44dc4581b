"""Makes docs/plan.png, the picture in README.rst: plans a small model, numbers places of its plan.html, and has a
browser draw that page.

    python docs/plan_picture.py                 # needs Chromium
    python docs/plan_picture.py --page          # writes docs/plan_picture.html only, for another browser
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nnscaler.command import ArgumentParser, run
from nnscaler.errors import UserError

WIDTH, HEIGHT = 1000, 2340  # pixels
PLAN = (
    "--run_mode compile --explain --name picture --model_id meta-llama/Meta-Llama-3-8B-Instruct "
    "--set num_hidden_layers=4 --sequence_length 32768 --plan_ngpus 2 --hardware h100 --gpu_mem_constraint 24 "
    "--enable-chunk-loss"
)
# What each number stands before, in the order of README.rst: headings of the page as it is written.
NUMBERED = (
    r"<h1>",
    r"<h2>Time of a step",
    r"<h2>Memory of a device",
    r"<h2>Memory of the host",
    r"<h2>What limits the plan",
    r"<h2>Operators, block by block",
    r"<h3>llama_decoder_layer",
)
BADGE = (
    "<span style='display:inline-block;width:26px;height:26px;margin-right:10px;border-radius:13px;background:#c2410c;"
    "color:#fff;font:bold 16px/26px sans-serif;text-align:center'>{}</span>"
)


def numbered(page: str) -> str:
    """The page with numbers, and without the tables of what is outside the layers."""
    page = re.sub(r"<section><h3>model\b.*?</section>", "", page, count=1, flags=re.DOTALL)
    for number, heading in enumerate(NUMBERED, 1):
        tag, words = heading[:4], heading[4:]
        page, found = re.subn(f"{tag}(?={words})", tag + BADGE.format(number), page)
        if not found:
            raise UserError(f"the page has no {heading}; change NUMBERED, and the list in README.rst")
    return page


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default="chromium", help="Chromium, or a browser that takes the same flags")
    parser.add_argument("--page", action="store_true", help="write the numbered page, and draw nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, str(ROOT / "train.py"), *PLAN.split(), "--gen_savedir", folder]
        subprocess.run(train, check=True, cwd=folder)
        page = numbered(Path(folder, "picture", "plan.html").read_text())
        written = ROOT / "docs" / "plan_picture.html" if options.page else Path(folder, "page.html")
        written.write_text(page)
        if not options.page:
            flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --force-device-scale-factor=1"
            size, picture = f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={ROOT / 'docs' / 'plan.png'}"
            subprocess.run([options.browser, *flags.split(), size, picture, f"file://{written}"], check=True)


if __name__ == "__main__":
    run(main)
