"""Where documents come from: local files and folders, datasets of the Hugging Face hub, and URLs."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from nnscaler import hub
from nnscaler.counting import counted
from nnscaler.data.encoding import Replaced
from nnscaler.data.files import is_url
from nnscaler.data.readers import READERS, Document, Row, kind, read_documents, read_rows, reading
from nnscaler.data.remote import located, opened
from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

# What comes with a dataset and is not its text: what people write about it, and what libraries note of it.
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|changelog|contributing|code_of_conduct|citation|croissant)([-_. ].*)?"
    r"|dataset_infos?\.json|dataset_dict\.json|state\.json|packing\.json",
    re.IGNORECASE,
)
PARQUET_BRANCH = "refs/convert/parquet"  # where the hub keeps every public dataset as <config>/<split>/*.parquet

Item = TypeVar("Item")


class Corpus:
    """The documents of some files, in the order of the files.

    Args:
        files: paths, each with one of the suffixes of `READERS`, or that and `.gz`.
        text_column, encoding: see `read_documents`.
        behind: a URL's files, which are read from there; None: files are local.

    Attributes:
        replaced: file -> how many characters could not be read and became U+FFFD, in the files read so far.
        silent: files read so far that had no document.
    """

    def __init__(
        self,
        files: list[Path],
        text_column: str | None = None,
        encoding: str | None = None,
        behind: RemoteFiles | None = None,
    ) -> None:
        self.files = files
        self.text_column, self.encoding, self.behind = text_column, encoding, behind
        self.replaced: dict[Path, int] = {}
        self.silent: list[Path] = []
        self.size = sum(map(self._size, files))  # bytes
        self._finished = 0
        self._file: IO[bytes] | None = None

    @property
    def position(self) -> int:
        """How many bytes of the files `documents` has read so far."""
        return self._finished + (self._file.tell() if self._file is not None else 0)

    def each_file(self) -> Iterator[Corpus]:
        """The files, each as a corpus of its own."""
        for path in self.files:
            yield Corpus([path], self.text_column, self.encoding, self.behind)

    def note(self, part: Corpus) -> None:
        """Takes what was found while a part of it was read."""
        if part is not self:
            self.replaced |= part.replaced
            self.silent += part.silent

    def documents(self) -> Iterator[Document]:
        """Yields each document. Where a document is an iterator, it must be used up before the next one is asked for.

        A .txt or .md file is one document; so is a row of a .jsonl, .json, .csv, .tsv or .parquet file. Text is taken
        as it is, except that characters that cannot be read, and lone surrogates, become U+FFFD. A row without text is
        "".

        Raises:
            UserError: a file cannot be read, is damaged (with its line), or has no such text column.
        """
        return self._each(lambda path, file: read_documents(path, file, self.text_column, self.encoding))

    def rows(self) -> Iterator[Row]:
        """Yields each row of the files, and where it stands. Raises UserError as `documents`."""
        return self._each(lambda path, file: read_rows(path, file, self.encoding))

    def _each(self, read: Callable[[Path, IO[bytes]], Iterator[Item]]) -> Iterator[Item]:
        self._finished = 0
        self.replaced, self.silent = {}, []
        for path in self.files:
            before, items = Replaced.count, 0
            with reading(path), self._open(path) as self._file:
                for item in read(path, self._file):
                    items += 1
                    yield item
            self._file = None
            self._finished += self._size(path)
            if Replaced.count > before:
                self.replaced[path] = Replaced.count - before
            if items == 0 or self._size(path) == 0:
                self.silent.append(path)

    def _open(self, path: Path) -> IO[bytes]:
        return open(path, "rb") if self.behind is None else opened(self.behind.system, self.behind.files[path][0])

    def _size(self, path: Path) -> int:
        if self.behind is not None:
            return self.behind.files[path][1]
        with reading(path):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a named pipe, say, of which nobody knows when it ends
            raise UserError(f"{path} is no regular file; documents are read from regular files alone")
        return status.st_size


@dataclass(frozen=True)
class RemoteFiles:
    """Files behind a URL: the file system (of fsspec) that opens them; the name that each has there, and its size in
    bytes."""

    system: Any
    files: Mapping[Path, tuple[str, int]]


def find_corpus(
    path_or_name: str, text_column: str | None = None, split: str | None = None, encoding: str | None = None
) -> Corpus:
    """The corpus in a local file, in a local folder (with all folders inside, in the order of paths), on the hub, or
    behind a URL.

    Args:
        path_or_name: a path; or `owner/dataset`, or `owner/dataset:config`, on the hub, whose files are downloaded; or
            the URL of a file or folder, which is read from there.
        text_column, encoding: see `read_documents`.
        split: on the hub, the split to take (None: train). In a folder, only files are taken that are in a subfolder of
            this name, or whose own name begins with it (None: all files).

    Raises:
        UserError: there is nothing, no file of a known type, or no such split.
    """
    if is_url(path_or_name):
        behind = _url_files(path_or_name, split)
        return Corpus(list(behind.files), text_column, encoding, behind)
    path = Path(path_or_name).expanduser()
    if os.path.isdir(path):
        return Corpus(_folder_files(path, split), text_column, encoding)
    if os.path.exists(path):
        _check_single(path, split)
        return Corpus([path], text_column, encoding)
    if path.suffix in READERS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", path_or_name):
        raise UserError(f"no such file or folder: {path_or_name}")
    return Corpus(_hub_files(path_or_name, split or "train"), text_column, encoding)


def _check_single(path: Path, split: str | None) -> None:
    """Raises UserError where a file cannot be read, or a split of it is asked for."""
    if kind(path) not in READERS:
        raise UserError(f"{path}: cannot read this type of file; known are {', '.join(READERS)} and .gz of these")
    if split is not None:
        raise UserError(f"{path} is a single file and has no split {split!r}; --split is for folders and hub names")


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    found = [path.relative_to(folder) for path in _files_below(folder)]
    return [folder / path for path in _chosen(folder, found, split)]


def _url_files(url: str, split: str | None) -> RemoteFiles:
    try:
        system, root = located(url)
        found = {name: int(about["size"] or 0) for name, about in system.find(root, detail=True).items()}
    except Exception as error:  # libraries of networks raise whatever they may
        raise UserError(f"cannot read {url}: {hub.first_line(error)}") from error
    if not found:
        raise UserError(f"no such file or folder: {url}")
    if root in found:
        _check_single(Path(root), split)
        return RemoteFiles(system, {Path(root): (root, found[root])})
    below = {Path(name.removeprefix(root).lstrip("/")): name for name in found}
    shown = [path for path in below if not any(part.startswith(".") for part in path.parts)]
    names = [below[path] for path in _chosen(url, shown, split)]
    return RemoteFiles(system, {Path(name): (name, found[name]) for name in names})


def _chosen(folder: Path | str, found: list[Path], split: str | None) -> list[Path]:
    """Of the files below a folder, those that hold documents of a split, in order."""
    found = sorted(found)
    known = [path for path in found if kind(path) in READERS]
    files = [path for path in known if not ABOUT.fullmatch(path.name)]
    if not files:
        raise UserError(f"{folder} holds no file that can be read; known are {', '.join(READERS)} and .gz of these")
    _say_left_out(folder, "of other types", Counter(path.suffix or path.name for path in set(found) - set(known)))
    _say_left_out(folder, "about the data", Counter(path.name for path in set(known) - set(files)))
    if split is not None:
        in_split = re.compile(rf"{re.escape(split)}(?![a-zA-Z0-9])")
        files = [path for path in files if split in path.parts[:-1] or in_split.match(path.name)]
        if not files:
            raise UserError(f"{folder} has no split {split!r}: no subfolder of that name and no file {split}-*")
    return files


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders, except hidden ones.

    Each folder and file is read once, by its own path rather than by that of a link, even where links lead in circles.
    """
    seen: set[tuple[int, int]] = set()
    folders, links, links_to_files = deque([folder]), deque[Path](), []
    while folders or links:
        parent = (folders or links).popleft()
        with reading(parent):
            if not _is_new(parent, seen):
                continue
            for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
                path = Path(entry.path)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif entry.is_symlink():
                    links_to_files.append(path)
                else:
                    seen.add(_identity(path))
                    yield path
    again: Counter[str] = Counter()
    for path in links_to_files:
        if not path.exists() or _is_new(path, seen):  # a broken one is an error for who reads it
            yield path
        else:
            again[path.name] += 1
    _say_left_out(folder, "that links lead to a second time", again)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether what a path leads to has not been seen yet; from now on it has."""
    if _identity(path) in seen:
        return False
    seen.add(_identity(path))
    return True


def _say_left_out(folder: Path | str, what: str, names: Counter[str]) -> None:
    if names:
        listed = ", ".join(f"{name} {count}" if count > 1 else name for name, count in names.most_common(5))
        more = ", ..." if len(names) > 5 else ""
        logger.info("%s: left out %s %s (%s%s)", folder, counted(names.total(), "file"), what, listed, more)


def _hub_files(name: str, split: str) -> list[Path]:
    """Local copies of the Parquet files that the hub made of a dataset, in whatever format the dataset itself is."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, config = name.partition(":")
    source: dict[str, Any] = {"repo_id": repo, "repo_type": "dataset", "revision": PARQUET_BRANCH}
    online = hub.reachable()
    try:
        if online:
            stored = HfApi().list_repo_files(**source)
        else:
            cached = Path(snapshot_download(**source, local_files_only=True))
            stored = [path.relative_to(cached).as_posix() for path in cached.rglob("*.parquet")]
        chosen = _choose_parquet(repo, stored, config, split)
        return [Path(hf_hub_download(**source, filename=file, local_files_only=not online)) for file in chosen]
    except LocalEntryNotFoundError as error:
        reason = "it is not in the local cache, and the hub cannot be reached"
        raise UserError(f"no such file, folder or dataset: {name}; {reason}") from error
    except UserError:
        raise
    except Exception as error:  # the client raises whatever the network makes it raise
        raise UserError(f"cannot get the dataset {name} from the hub: {hub.first_line(error)}") from error


def _choose_parquet(repo: str, stored: list[str], config: str, split: str) -> list[str]:
    """The files of one config and split, among paths `<config>/<split>/<number>.parquet`."""
    folders = {path.rpartition("/")[0] for path in stored if path.endswith(".parquet")}
    configs = sorted({folder.partition("/")[0] for folder in folders})
    if not config and ("default" in configs or len(configs) == 1):
        config = "default" if "default" in configs else configs[0]
    if config not in configs:
        raise UserError(f"{repo}: choose a config as {repo}:CONFIG; there are {', '.join(configs) or 'none'}")
    splits = {
        folder.partition("/")[2].removeprefix("partial-"): folder
        for folder in sorted(folders)
        if folder.startswith(f"{config}/")
    }
    if split not in splits:
        raise UserError(f"{repo} has no split {split!r}; there are {', '.join(sorted(splits))}")
    if splits[split].startswith(f"{config}/partial-"):
        logger.warning("%s: the hub has converted only the first part of this large dataset", repo)
    return sorted(path for path in stored if path.startswith(splits[split] + "/"))
