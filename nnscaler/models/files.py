"""Files of a model: its weights, and what else makes an exported directory complete."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

from transformers import PretrainedConfig

from nnscaler import hub
from nnscaler.data.files import PROVENANCE
from nnscaler.errors import UserError
from nnscaler.models.weights import WeightFiles, how_to_convert

logger = logging.getLogger(__name__)


def find_weights(model_id: str) -> Path | None:
    """The directory with a model's safetensors; None for a local directory that has none, whose model starts anew.

    Weights on the hub are downloaded. Raises UserError where they cannot be, or are not whole.
    """
    directory = Path(model_id)
    if directory.is_dir():
        return directory if WeightFiles.find(directory) is not None else None
    from huggingface_hub import snapshot_download

    try:
        online = hub.reachable()
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        directory = Path(snapshot_download(model_id, allow_patterns=patterns, local_files_only=not online))
    except Exception as error:  # the client raises whatever the network makes it raise
        raise UserError(
            f"cannot get the weights of {model_id} ({hub.first_line(error)}); give a local directory as model_id, "
            "such as one that create_mini_model.py wrote"
        ) from error
    if WeightFiles.find(directory) is None:
        raise UserError(f"{model_id} has no safetensors; {how_to_convert(model_id)}")
    return directory


class AssetWriter:
    """Writes a model's config.json, for weights of `dtype`, and tokenizer into a folder.

    The tokenizer is the model's own, or the one that the dataset was prepared with.
    """

    def __init__(self, config: PretrainedConfig, dtype: str, model_id: str, dataset_path: Path | None) -> None:
        self._config, self._dtype, self._sources = config, dtype, [model_id]
        if dataset_path is not None and (dataset_path / PROVENANCE).exists():
            self._sources.append(json.loads((dataset_path / PROVENANCE).read_text())["tokenizer"])

    def __call__(self, folder: Path) -> None:
        config = copy.deepcopy(self._config)
        config.use_cache = True  # it was off for training alone
        config.dtype = self._dtype
        config.save_pretrained(folder)
        for source in self._sources:
            try:
                hub.load_tokenizer(source).save_pretrained(folder)
                return
            except UserError:
                continue
        logger.warning("no tokenizer in %s: checkpoints have none", " or ".join(self._sources))
