"""Tokenises text and packs it into sequences of equal length: a dataset directory that train.py reads."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from nnscaler.cli.flags import parse
from nnscaler.command import run
from nnscaler.directory import check_new
from nnscaler.options import REQUIRED, check, path, text, whole


@dataclass(frozen=True)
class Options:
    """What to pack, and how."""

    data_path_or_name: str = text(
        REQUIRED, "text to pack: a file, a folder (read with its subfolders, in the order of the paths) or a dataset "
        "on the Hugging Face hub, as OWNER/NAME or OWNER/NAME:CONFIG. Files are .txt or .md (one document each), "
        ".jsonl, .json, .parquet, or .csv or .tsv with a header line (one document a row), or .gz of these",
        shown="DATA",
    )  # fmt: skip
    tokenizer_path_or_name: str = text(
        REQUIRED, "tokenizer: a directory, or a model on the hub; its bos and eos tokens are put around each document",
        shown="TOKENIZER",
    )  # fmt: skip
    save_path: Path = path(
        REQUIRED, "directory to write the dataset to, new or empty; it appears only when it is complete"
    )
    sequence_length: int = whole(
        REQUIRED, "length of each sequence, in tokens; tokens that do not fill a last one are left out",
        least=2, most=2**30,
    )  # fmt: skip
    text_column: str | None = text(
        None, "column of the rows that holds the text (default: text, or else the only column of strings)"
    )
    split: str | None = text(
        None, "split to read. On the hub: its name (default: train). In a folder: the name of subfolders, or what the "
        "names of files begin with (default: all files)",
    )  # fmt: skip
    encoding: str | None = text(
        None, "encoding of files of text, such as latin-1 (default: what their first bytes say, or else utf-8; what "
        "that cannot read is counted)",
    )  # fmt: skip
    num_proc: int | None = whole(
        None, "threads that tokenise; the result does not depend on it (default: the number of cores)",
        least=1, most=4096,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        check_new(self.save_path)


def main() -> None:
    options = parse(__doc__ or "", {"what to pack": Options}).make(Options)
    threads = options.num_proc or len(os.sched_getaffinity(0))

    # What takes seconds to import comes after the flags are judged.
    from nnscaler import hub
    from nnscaler.data.encoding import check_encoding
    from nnscaler.data.pack import pack
    from nnscaler.data.sources import find_corpus

    if options.encoding is not None:
        check_encoding(options.encoding)
    corpus = find_corpus(options.data_path_or_name, options.text_column, options.split, options.encoding)
    tokenizer = hub.load_tokenizer(options.tokenizer_path_or_name)
    packing = pack(
        corpus,
        tokenizer,
        options.save_path,
        options.sequence_length,
        threads,
        provenance={
            "data": options.data_path_or_name,
            "text_column": options.text_column,
            "split": options.split,
            "tokenizer": options.tokenizer_path_or_name,
        },
    )

    empty = f" and {packing.empty_documents:,} empty ones skipped" if packing.empty_documents else ""
    print(f"documents  {packing.documents:,}{empty}")
    print(f"tokens     {packing.tokens:,} with bos and eos, {packing.tokens / packing.seconds:,.0f} tokens/s")
    print(f"sequences  {packing.sequences:,} of {packing.sequence_length:,} tokens")
    print(f"continued  {packing.continued:,} sequences begin within a document")
    print(f"tail       {packing.tail:,} tokens left out")
    if corpus.replaced:
        count = packing.replaced_characters
        print(f"replaced   {count:,} characters that could not be read, in {listed(corpus.replaced)}")
        print("           --encoding says how files of text are to be read")
    if corpus.silent:
        print(f"no text    in {listed(corpus.silent)}")
    print(f"saved to   {options.save_path}")


def listed(files: Collection[Path]) -> str:
    more = f" and {len(files) - 3:,} more files" if len(files) > 3 else ""
    return ", ".join(str(path) for path in list(files)[:3]) + more


if __name__ == "__main__":
    run(main)
