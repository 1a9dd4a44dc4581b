"""Makes a small model of the architecture of a large one, with fewer layers and random weights, to debug with."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nnscaler import hub
from nnscaler.cli.args import ArgumentParser, run
from nnscaler.directory import check_new, new_directory
from nnscaler.errors import UserError
from nnscaler.models import load_config
from nnscaler.models.changes import changed_config

logger = logging.getLogger("create_mini_model")

SET_HELP = """another field of the configuration and its new value, such as hidden_size=512 or rope_theta=10000.0; may
    be given several times (default: the fields of the large model)"""
TOKENIZER_HELP = """tokenizer to copy beside the weights: a directory, or a model on the hub (default: that of
    --model_id, if it can be had)"""


def parser() -> ArgumentParser:
    flags = ArgumentParser(description=__doc__)
    flags.add_argument("--model_id", required=True, help="large model: a directory, or a name on the hub. Required")
    flags.add_argument("--output_id", required=True, help="directory to write the model to, new or empty. Required")
    flags.add_argument("--num_hidden_layers", default="4", help="number of layers, 1 or more")
    flags.add_argument("--set", metavar="FIELD=VALUE", action="append", help=SET_HELP)
    flags.add_argument("--seed", type=int, default=0, help="seed of the random weights, 0 or more")
    flags.add_argument("--tokenizer", help=TOKENIZER_HELP)
    return flags


def main() -> None:
    args = parser().parse_args()
    output = Path(args.output_id)
    check_new(output)
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}, and must be 0 or more and less than 2^63")
    changes = {"num_hidden_layers": args.num_hidden_layers, **parse_changes(args.set or [])}
    config = changed_config(load_config(args.model_id), changes)
    tokenizer = load_tokenizer(args.tokenizer, args.model_id)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} ids, more than vocab_size {config.vocab_size}")

    with new_directory(output) as directory:
        model = initialised_model(config, args.seed)
        model.save_pretrained(directory)
        for weights in directory.glob("*.safetensors"):  # which safetensors lets nobody else read
            weights.chmod((directory / "config.json").stat().st_mode)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    print(f"parameters  {model.num_parameters():,}")
    print(f"size        {sum(file.stat().st_size for file in output.iterdir()) / 1e6:,.1f} MB")
    print(f"saved to    {output}")


def parse_changes(assignments: list[str]) -> dict[str, str]:
    changes = {}
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        if not (field and equals):
            raise UserError(f"--set takes FIELD=VALUE, not {assignment!r}")
        changes[field] = value
    return changes


def load_tokenizer(path_or_name: str | None, model_id: str) -> Any:
    """The tokenizer asked for; or else the model's own, or None if it cannot be had."""
    if path_or_name is not None:
        return hub.load_tokenizer(path_or_name)
    try:
        return hub.load_tokenizer(model_id)
    except UserError as error:
        logger.info("no tokenizer is copied (--tokenizer names one): %s", error)
        return None


def initialised_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model in bfloat16 with weights drawn as its class draws them; the same ones for the same seed.

    Raises:
        UserError: there is no causal language model of this configuration, or not enough memory for it.
    """
    try:
        with torch.device("meta"):  # so that the layers do not draw weights of their own before the model does
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # a value that no check of ours knows makes the class raise whatever it may
        reason = f"{type(error).__name__}: {hub.first_line(error)}"
        raise UserError(f"cannot build a {config.model_type} language model: {reason}") from error
    size, memory = model.get_memory_footprint(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(f"the weights take {size / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f} GB of memory")
    logger.info("drawing %s weights", f"{model.num_parameters():,}")
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    return model


if __name__ == "__main__":
    run(main)
