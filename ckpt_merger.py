"""Merges the newest complete sharded checkpoint below a folder into one file, or into a Hugging Face model directory.

    python ckpt_merger.py --ckpt_dir ./checkpoints --output_fname ./merged.ckpt
    python ckpt_merger.py --ckpt_dir ./checkpoints --output_dir ./merged_model

The file holds model and optimizer, and resumes training on any number of processes (train.py --resume_path). The
directory holds safetensors, configuration and tokenizer, as transformers' from_pretrained expects.
"""

from __future__ import annotations

from pathlib import Path

from nnscaler.checkpoint.folder import latest_checkpoint
from nnscaler.checkpoint.merge import Checkpoint, export_model, merge_to_file
from nnscaler.cli.args import ArgumentParser, run
from nnscaler.errors import UserError


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt_dir", type=Path, required=True, help="checkpoint, or folder with checkpoints below it")
    parser.add_argument("--output_fname", type=Path, help="file to write: model, optimizer and progress")
    parser.add_argument("--output_dir", type=Path, help="Hugging Face model directory to write")
    options = parser.parse_args()
    if options.output_fname is None and options.output_dir is None:
        raise UserError("nothing to write: give --output_fname, --output_dir or both")
    folder = latest_checkpoint(options.ckpt_dir)
    checkpoint = Checkpoint.open(folder)
    print(f"merging {folder}: step {checkpoint.state.step}, {checkpoint.state.consumed} samples")
    if options.output_fname is not None:
        merge_to_file(checkpoint, options.output_fname)
        print(f"wrote {options.output_fname} ({options.output_fname.stat().st_size / 2**20:.1f} MiB)")
    if options.output_dir is not None:
        export_model(checkpoint, options.output_dir)
        print(f"wrote {options.output_dir}")


if __name__ == "__main__":
    run(main)
