"""Tokenises text, or conversations, and packs it into sequences of equal length: a dataset that train.py reads."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnscaler.cli.flags import parse
from nnscaler.command import run
from nnscaler.counting import counted
from nnscaler.data.files import is_url
from nnscaler.directory import check_new
from nnscaler.errors import UserError
from nnscaler.options import REQUIRED, check, path, text, whole

if TYPE_CHECKING:
    from nnscaler.data.sources import Corpus


@dataclass(frozen=True)
class Options:
    """What to pack, and how."""

    data_path_or_name: str = text(
        REQUIRED, "text to pack: a file, a folder (read with its subfolders, in the order of the paths) or a dataset "
        "on the Hugging Face hub, as OWNER/NAME or OWNER/NAME:CONFIG; or the URL of a file or folder, such as "
        "hf://datasets/OWNER/NAME, which is read from there and not kept. Files are .txt or .md (one document each), "
        ".jsonl, .json, .parquet, or .csv or .tsv with a header line (one document a row), or .gz of these",
        shown="DATA",
    )  # fmt: skip
    tokenizer_path_or_name: str = text(
        REQUIRED, "tokenizer: a directory, or a model on the hub; its bos and eos tokens are put around each document",
        shown="TOKENIZER",
    )  # fmt: skip
    save_path: str = text(
        REQUIRED, "directory to write the dataset to, new or empty; it appears only when it is complete. Or a URL, "
        "such as s3://BUCKET/NAME or file:///FOLDER, where Parquet files are written; if interrupted, the same command "
        "goes on there", shown="PATH",
    )  # fmt: skip
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

    messages_column: str | None = text(
        None, "column of the rows that holds a conversation: a list of messages with role and content, as the "
        "tokenizer's chat template takes them. Conversations are packed whole (default: documents of text are packed)",
    )  # fmt: skip
    prompt_column: str | None = text(None, "with completion_column: column of prompts, texts or lists of messages")
    completion_column: str | None = text(None, "with prompt_column: column of what completes each prompt")
    train_on: str = text(
        "assistant", "of conversations, what is learned; assistant: what the assistant says, or what completes a "
        "prompt; all: every token", choices=("assistant", "all"),
    )  # fmt: skip
    too_long: str = text(
        "drop", "what becomes of conversations that are longer than a sequence; drop: they are left out; cut: they are "
        "cut at its end", choices=("drop", "cut"),
    )  # fmt: skip
    chat_template: Path | None = path(
        None, "file with a chat template in Jinja, which may mark with {% generation %} what the assistant says "
        "(default: the tokenizer's)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.target, Path):
            check_new(self.target)
        if (self.prompt_column is None) != (self.completion_column is None):
            raise UserError("prompt_column and completion_column go together, and one of them is not given")
        given = [
            name for name in ("text_column", "messages_column", "prompt_column") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} are both given; rows hold one or the other")
        if self.chat_template is not None and not self.chat_template.is_file():
            raise UserError(f"chat_template is '{self.chat_template}', which is not a file")
        if self.chat_template is not None and not self.talks:
            raise UserError(f"chat_template is '{self.chat_template}', which needs messages_column or prompt_column")

    @property
    def target(self) -> Path | str:
        """Where the dataset is written to: a directory, or a URL."""
        return self.save_path if is_url(self.save_path) else Path(self.save_path).expanduser()

    @property
    def talks(self) -> bool:
        """Whether conversations are packed."""
        return self.messages_column is not None or self.prompt_column is not None


def main() -> None:
    options = parse(__doc__ or "", {"what to pack": Options}).make(Options)
    threads = options.num_proc or len(os.sched_getaffinity(0))

    # What takes seconds to import comes after the flags are judged.
    from nnscaler import hub
    from nnscaler.data.encoding import check_encoding
    from nnscaler.data.sources import find_corpus

    if options.encoding is not None:
        check_encoding(options.encoding)
    corpus = find_corpus(options.data_path_or_name, options.text_column, options.split, options.encoding)
    tokenizer = hub.load_tokenizer(options.tokenizer_path_or_name)
    lines = (pack_conversations if options.talks else pack_text)(options, corpus, tokenizer, threads)
    for what, found in lines:
        print(f"{what:<10} {found}")
    if corpus.replaced:
        count = sum(corpus.replaced.values())
        print(f"replaced   {counted(count, 'character')} that could not be read, in {listed(corpus.replaced)}")
        print("           --encoding says how files of text are to be read")
    if corpus.silent:
        print(f"no text    in {listed(corpus.silent)}")
    print(f"saved to   {options.target}")


def pack_text(options: Options, corpus: Corpus, tokenizer: Any, threads: int) -> Iterator[tuple[str, str]]:
    """Packs documents; then says what became of them."""
    from nnscaler.data.pack import pack

    packing = pack(
        corpus,
        tokenizer,
        options.target,
        options.sequence_length,
        threads,
        provenance={
            "data": options.data_path_or_name,
            "text_column": options.text_column,
            "split": options.split,
            "tokenizer": options.tokenizer_path_or_name,
        },
    )
    empty = f"; skipped because they are empty: {packing.empty_documents:,}" if packing.empty_documents else ""
    yield "documents", f"{packing.documents:,}{empty}"
    yield "tokens", f"{packing.tokens:,} with bos and eos, {packing.tokens / packing.seconds:,.0f} tokens/s"
    yield "sequences", f"{packing.sequences:,} of {packing.sequence_length:,} tokens"
    yield "continued", f"{counted(packing.continued, 'sequence')} beginning within a document"
    yield "tail", f"{counted(packing.tail, 'token')} left out"


def pack_conversations(options: Options, corpus: Corpus, tokenizer: Any, threads: int) -> Iterator[tuple[str, str]]:
    """Packs conversations; then says what became of them."""
    from nnscaler.data.conversations import Columns, Speech, pack_conversations

    columns = Columns(options.messages_column, options.prompt_column, options.completion_column)
    template = template_in(options.chat_template) if options.chat_template else None
    fitting = pack_conversations(
        corpus,
        Speech(tokenizer, columns, template, options.train_on == "all"),
        tokenizer,
        options.target,
        options.sequence_length,
        threads,
        options.too_long == "cut",
        provenance={
            "data": options.data_path_or_name,
            **vars(columns),
            "split": options.split,
            "tokenizer": options.tokenizer_path_or_name,
            "train_on": options.train_on,
            "too_long": options.too_long,
            "chat_template": template,
        },
    )
    yield "packed", f"{counted(fitting.documents, 'conversation')}, {fitting.cut:,} of them cut"
    yield "left out", f"{fitting.dropped:,} too long, and {fitting.unlearned:,} in which nothing would be learned"
    speed = f"{fitting.tokens / fitting.seconds:,.0f} tokens/s"
    yield "tokens", f"{fitting.tokens:,}, of which {fitting.learned:,} are learned, {speed}"
    share = fitting.padding / (fitting.sequences * fitting.sequence_length)
    yield (
        "sequences",
        f"{fitting.sequences:,} of {fitting.sequence_length:,} tokens, {100 * share:.1f} % of them padding",
    )


def template_in(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template is '{path}', which cannot be read: {error}") from error


def listed(files: Collection[Path]) -> str:
    more = f" and {counted(len(files) - 3, 'more file')}" if len(files) > 3 else ""
    return ", ".join(str(path) for path in list(files)[:3]) + more


if __name__ == "__main__":
    run(main)
