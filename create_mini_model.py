"""Makes a small model of the architecture of a large one, with fewer layers and random weights, to debug with."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnscaler.cli.flags import parse
from nnscaler.command import run
from nnscaler.directory import check_new, new_directory
from nnscaler.errors import UserError
from nnscaler.options import REQUIRED, assignments, check, path, text, whole

if TYPE_CHECKING:  # transformers takes seconds to import: what is wrong with a flag is said before
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger("create_mini_model")


@dataclass(frozen=True)
class Options:
    """Of what model to make a small one, and how small."""

    model_id: str = text(REQUIRED, "large model: a directory, or a name on the hub", shown="MODEL")
    output_id: Path = path(REQUIRED, "directory to write the model to, new or empty")
    num_hidden_layers: int = whole(4, "number of layers", least=1, most=2**20)
    set: Mapping[str, str] = assignments(
        "another field of the configuration and its new value, such as hidden_size=512 or rope_theta=10000.0; may be "
        "given several times (default: the fields of the large model)"
    )
    seed: int = whole(0, "seed of the random weights", least=0, most=2**63 - 1)
    tokenizer: str | None = text(
        None, "tokenizer to copy beside the weights, whose bos and eos ids the configuration then has: a directory, or "
        "a model on the hub (default: that of --model_id, if it can be had)", shown="TOKENIZER",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        check_new(self.output_id)


def main() -> None:
    options = parse(__doc__ or "", {"what to make": Options}).make(Options)
    from nnscaler.models import load_config
    from nnscaler.models.changes import changed_config
    from nnscaler.models.exported import write_config, write_older_tokenizer

    changes = {"num_hidden_layers": str(options.num_hidden_layers), **options.set}
    config = changed_config(load_config(options.model_id), changes)
    tokenizer = load_tokenizer(options.tokenizer, options.model_id)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        logger.warning(
            "the tokenizer has %d ids, more than vocab_size %d: data with those beyond cannot be trained on",
            len(tokenizer), config.vocab_size,
        )  # fmt: skip

    if options.tokenizer is not None:  # which may end a document with another token than the large model's
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        config.update({name: id_ for name, id_ in ids.items() if id_ is not None and name not in options.set})

    output = options.output_id
    with new_directory(output) as directory:
        model = initialised_model(config, options.seed)
        model.save_pretrained(directory)
        write_config(model.config, directory / "config.json")
        for weights in directory.glob("*.safetensors"):  # which safetensors lets nobody else read
            weights.chmod((directory / "config.json").stat().st_mode)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
            write_older_tokenizer(directory)
    print(f"parameters  {model.num_parameters():,}")
    print(f"size        {sum(file.stat().st_size for file in output.iterdir()) / 1e6:,.1f} MB")
    print(f"saved to    {output}")


def load_tokenizer(path_or_name: str | None, model_id: str) -> Any:
    """The tokenizer asked for; or else the model's own, or None if it cannot be had."""
    from nnscaler import hub

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
    import torch
    from transformers import AutoModelForCausalLM

    from nnscaler import hub

    try:
        with torch.device("meta"):  # so that the layers do not draw weights of their own before the model does
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **hub.NO_CODE)
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
