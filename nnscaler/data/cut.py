"""Cutting a long document into pieces, such that the tokens of the pieces, one after the other, are those of the whole.

A tokenizer needs a hundred bytes of memory for each token. So a document that is a whole book, or a dump, goes through
it in pieces. Several pieces can go through it at the same time.
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
    """Yields the text of one document in pieces that can be tokenised one by one; none of them is empty.

    Args:
        blocks: the text of the document, in blocks of any length.
        encode: gives the ids of a text, without special tokens.
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
    """Where, near the end of `text`, one piece ends and the next begins, such that their ids are those of the text."""
    end = len(text) - CONTEXT
    for place, left_out in PLACES_TO_CUT:
        stops = [match.start() for match in place.finditer(text, max(CONTEXT, end - SEARCHED), end)]
        for stop in reversed(stops[-TRIES:]):
            before, after = text[stop - CONTEXT : stop], text[stop : stop + CONTEXT]
            if encode(before) + encode(after[left_out:]) == encode(before + after):
                return stop, stop + left_out
    return None
