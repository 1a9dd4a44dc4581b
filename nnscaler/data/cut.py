"""Cuts a long document into pieces whose tokens, one piece after the other, are the tokens of the whole.

A tokenizer needs a hundred bytes of memory a token, so a book or a dump in one document has to go through it in pieces;
and pieces can go through it side by side.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator

logger = logging.getLogger(__name__)

PIECE = 1 << 17  # characters in a piece, about
LONGEST_PIECE = 32 * PIECE  # characters after which a cut is made even where it may change a token
SEARCHED = 4096  # characters at the end of a piece in which a place to cut is looked for
CONTEXT = 128  # characters on either side of a cut that are tokenised to see that it changes nothing
TRIES = 16  # places of each kind that are tested

# A cut is made where a word ends, because that does not depend on what was before the word, as it may inside a row of
# digits: so the text around the cut can stand for the whole document. The number is how many characters the next piece
# leaves out: tokenizers that put a space before every text, as SentencePiece does, would double the one that is there.
PLACES_TO_CUT = (
    (re.compile(r"(?<=\w)(?=\s\w)"), 0),
    (re.compile(r"(?<=\w)(?=\W)"), 0),
    (re.compile(r"(?<=\w)(?= \w)"), 1),
)

TokenIds = list[int]


def cut_into_pieces(blocks: Iterable[str], encode: Callable[[str], TokenIds]) -> Iterator[str]:
    """Yields the text of one document in pieces that can be tokenised one by one, none of them empty.

    Args:
        blocks: the text of the document, in blocks of any length.
        encode: the ids of a text, without special tokens.
    """
    text = ""
    for block in blocks:
        for start in range(0, len(block), PIECE):
            text += block[start : start + PIECE]
            if len(text) < PIECE:
                continue
            cut = _safe_cut(text, encode)
            if cut is None and len(text) >= LONGEST_PIECE:
                logger.warning("%d characters without a safe place to cut: a token may differ there", len(text))
                cut = len(text), len(text)
            if cut is not None:
                stop, resume = cut
                yield text[:stop]
                text = text[resume:]
    if text:
        yield text


def _safe_cut(text: str, encode: Callable[[str], TokenIds]) -> tuple[int, int] | None:
    """Where one piece stops and the next resumes, near the end of `text`, such that their ids are those of the text."""
    end = len(text) - CONTEXT
    for place, left_out in PLACES_TO_CUT:
        stops = [match.start() for match in place.finditer(text, max(CONTEXT, end - SEARCHED), end)]
        for stop in reversed(stops[-TRIES:]):
            before, after = text[stop - CONTEXT : stop], text[stop : stop + CONTEXT]
            if encode(before) + encode(after[left_out:]) == encode(before + after):
                return stop, stop + left_out
    return None
