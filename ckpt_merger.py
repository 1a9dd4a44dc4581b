"""Merges the newest complete sharded checkpoint below a folder into one file, or into a Hugging Face model directory.

    python ckpt_merger.py --ckpt_dir ./checkpoints --output_fname ./merged.ckpt
    python ckpt_merger.py --ckpt_dir ./checkpoints --output_dir ./merged_model
    python ckpt_merger.py --ckpt_dir ./checkpoints --list

The file holds model and optimizer, and resumes training on any number of processes (train.py --resume_path). The
directory holds safetensors, configuration and tokenizer, as transformers' from_pretrained expects.
"""

from __future__ import annotations

from pathlib import Path

from nnscaler.checkpoint.checksums import Checksums, CorruptCheckpoint
from nnscaler.checkpoint.export import export_model
from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.merge import merge_to_file
from nnscaler.checkpoint.stored import Checkpoint, describe, describe_all
from nnscaler.cli.args import ArgumentParser, run
from nnscaler.errors import UserError


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_dir", type=Path, required=True, help="checkpoint, or folder with checkpoints below it")
    parser.add_argument("--output_fname", type=Path, help="file to write: model, optimizer and progress")
    parser.add_argument("--output_dir", type=Path, help="Hugging Face model directory to write")
    parser.add_argument("--list", action="store_true", help="show the checkpoints, and what the newest of them holds")
    parser.add_argument("--verify", action="store_true", help="read what was written again, and compare; with nothing "
        "to write, read the checkpoint itself")  # fmt: skip
    options = parser.parse_args()
    if not (options.output_fname or options.output_dir or options.list or options.verify):
        raise UserError("nothing to write: give --output_fname, --output_dir or both; or --list or --verify")
    folder = latest_checkpoint(options.ckpt_dir)
    if options.list:
        print("\n".join(describe_all(options.ckpt_dir)), end="\n\n")
        print("\n".join(describe(Checkpoint.open(folder))))
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
    damages = list(Checksums.read(folder).damages(shards=True))
    if damages:
        print("\n".join(damages))
        raise CorruptCheckpoint(f"checkpoint '{folder}' has {len(damages)} damaged pieces")
    print(f"{folder}: every file is as it was written")


if __name__ == "__main__":
    run(main)
