"""Merges the newest complete sharded checkpoint below a folder into one file, or into a Hugging Face model directory.

    python ckpt_merger.py --ckpt_dir ./checkpoints --output_fname ./merged.ckpt
    python ckpt_merger.py --ckpt_dir ./checkpoints --output_dir ./merged_model
    python ckpt_merger.py --ckpt_dir ./checkpoints --list [--tensors]

The file holds model and optimizer, and resumes training on any number of processes (train.py --resume_path). The
directory holds safetensors, configuration and tokenizer, as transformers' from_pretrained expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnscaler.cli.flags import parse
from nnscaler.command import run
from nnscaler.counting import counted
from nnscaler.directory import check_new, check_writable
from nnscaler.errors import UserError
from nnscaler.options import REQUIRED, check, path, switch

# What takes seconds to import comes after the flags are judged.


@dataclass(frozen=True)
class Options:
    """Which checkpoint, and what to make of it."""

    ckpt_dir: Path = path(REQUIRED, "checkpoint, or folder with checkpoints below it")
    output_fname: Path | None = path(None, "file to write: model, optimizer and progress")
    output_dir: Path | None = path(None, "Hugging Face model directory to write, new or empty")
    list: bool = switch("show the checkpoints, one a line")
    tensors: bool = switch("with --list: show what the newest of them holds, one tensor a line")
    verify: bool = switch("read what was written again, and compare; with nothing to write, read the checkpoint itself")

    def __post_init__(self) -> None:
        check(self)
        if self.tensors and not self.list:
            raise UserError("tensors goes with --list, which is not given")
        if not (self.output_fname or self.output_dir or self.list or self.verify):
            raise UserError("nothing to write: give --output_fname, --output_dir or both; or --list or --verify")
        if self.output_dir is not None:
            check_new(self.output_dir)
            check_writable(self.output_dir, "output_dir")
        if self.output_fname is not None:
            if self.output_fname.is_dir():
                raise UserError(f"output_fname is '{self.output_fname}', which is a directory; it must be a file")
            check_writable(self.output_fname.parent, "output_fname's folder")


def main() -> None:
    options = parse(__doc__ or "", {"what to merge": Options}).make(Options)
    from nnscaler.checkpoint.export import export_model
    from nnscaler.checkpoint.folder import latest_checkpoint
    from nnscaler.checkpoint.merge import merge_to_file
    from nnscaler.checkpoint.stored import Checkpoint, describe, describe_all

    folder = latest_checkpoint(options.ckpt_dir)
    if options.list:
        print("\n".join(describe_all(options.ckpt_dir)))
        if options.tensors:
            print("\n".join(["", *describe(Checkpoint.open(folder))]))
    if options.output_fname is None and options.output_dir is None:
        if options.verify:
            verify_checkpoint(folder)
        return
    checkpoint = Checkpoint.open(folder)
    verified = " and read it again" if options.verify else ""
    print(f"merging {folder}: step {checkpoint.state.step}, {checkpoint.state.consumed} samples")
    if options.output_fname is not None:
        merge_to_file(checkpoint, options.output_fname, options.verify)
        print(f"wrote {options.output_fname} ({options.output_fname.stat().st_size / 2**20:.1f} MiB){verified}")
    if options.output_dir is not None:
        export_model(checkpoint, options.output_dir, options.verify)
        print(f"wrote {options.output_dir}{verified}")


def verify_checkpoint(folder: Path) -> None:
    """Reads every byte. Raises CorruptCheckpoint, having printed all that is damaged."""
    from nnscaler.checkpoint.checksums import Checksums, CorruptCheckpoint

    damages = list(Checksums.read(folder).damages(shards=True))
    if damages:
        print("\n".join(damages))
        raise CorruptCheckpoint(f"checkpoint '{folder}' has {counted(len(damages), 'damaged piece')}")
    print(f"{folder}: every file is as it was written")


if __name__ == "__main__":
    run(main)
