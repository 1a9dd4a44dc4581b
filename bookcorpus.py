"""Tokenises text and packs it into sequences of equal length: a dataset directory that train.py reads."""

from __future__ import annotations

import os
from pathlib import Path

from nnscaler import hub
from nnscaler.cli.args import ArgumentParser, run
from nnscaler.data.pack import pack
from nnscaler.data.sources import find_corpus
from nnscaler.directory import check_new
from nnscaler.errors import UserError

DATA_HELP = """text to pack: a file, a folder (read recursively, in the order of the paths) or a dataset on the Hugging
    Face hub, as OWNER/NAME or OWNER/NAME:CONFIG. Files are .txt or .md (one document each), .jsonl, .json, .parquet or
    .csv with a header line (one document a row), or .gz of these. Required"""
TOKENIZER_HELP = """tokenizer: a directory, or a model on the hub; its bos and eos tokens are put around each document.
    Required"""
SAVE_HELP = """directory to write the dataset to, new or empty; it appears only when it is complete. Required"""
LENGTH_HELP = (
    """length of each sequence, in tokens, 2 or more; tokens that do not fill a last one are left out. Required"""
)
COLUMN_HELP = """column of the rows that holds the text (default: text, or else the only column of strings)"""
SPLIT_HELP = """split to read. On the hub: its name (default: train). In a folder: the name of subfolders, or what the
    names of files begin with (default: all files)"""
THREADS_HELP = """threads that tokenise, 1 or more; the result does not depend on it (default: the number of cores)"""


def parser() -> ArgumentParser:
    flags = ArgumentParser(description=__doc__)
    flags.add_argument("--data_path_or_name", required=True, help=DATA_HELP)
    flags.add_argument("--tokenizer_path_or_name", required=True, help=TOKENIZER_HELP)
    flags.add_argument("--save_path", required=True, help=SAVE_HELP)
    flags.add_argument("--sequence_length", required=True, type=int, help=LENGTH_HELP)
    flags.add_argument("--text_column", help=COLUMN_HELP)
    flags.add_argument("--split", help=SPLIT_HELP)
    flags.add_argument("--num_proc", type=int, help=THREADS_HELP)
    return flags


def main() -> None:
    args = parser().parse_args()
    threads = len(os.sched_getaffinity(0)) if args.num_proc is None else args.num_proc
    if args.sequence_length < 2:
        raise UserError(f"--sequence_length is {args.sequence_length}, and must be 2 tokens or more")
    if threads < 1:
        raise UserError(f"--num_proc is {threads}, and must be 1 thread or more")
    save_path = Path(args.save_path)
    check_new(save_path)
    corpus = find_corpus(args.data_path_or_name, args.text_column, args.split)
    tokenizer = hub.load_tokenizer(args.tokenizer_path_or_name)
    packing = pack(
        corpus,
        tokenizer,
        save_path,
        args.sequence_length,
        threads,
        provenance={
            "data": args.data_path_or_name,
            "text_column": args.text_column,
            "split": args.split,
            "tokenizer": args.tokenizer_path_or_name,
        },
    )

    empty = f" and {packing.empty_documents:,} empty ones skipped" if packing.empty_documents else ""
    print(f"documents  {packing.documents:,}{empty}")
    print(f"tokens     {packing.tokens:,} with bos and eos, {packing.tokens / packing.seconds:,.0f} tokens/s")
    print(f"sequences  {packing.sequences:,} of {packing.sequence_length:,} tokens")
    print(f"tail       {packing.tail:,} tokens left out")
    print(f"saved to   {save_path}")


if __name__ == "__main__":
    run(main)
