"""The files of a model: its weights, and what else makes an exported directory complete."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from nnscaler import hub
from nnscaler.data.files import PROVENANCE
from nnscaler.errors import UserError
from nnscaler.models.exported import write_config, write_older_tokenizer
from nnscaler.models.positions import set_trained_length
from nnscaler.models.weights import OTHER_FORMATS, WeightFiles, how_to_convert

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

SMALL = 64 * 2**20  # bytes of a file that is copied beside the weights: the largest tokenizers have half of that
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", *OTHER_FORMATS)


def find_weights(model_id: str) -> Path | None:
    """The directory with a model's safetensors. None for a local directory that has none: its model starts anew.

    Weights on the hub are downloaded. Raises UserError where they cannot be, or are not complete.
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
    """Writes what makes an exported model complete into a folder: everything but its weights.

    That is config.json, for weights of `dtype`, and what else the model's own directory has: tokenizer, chat template,
    generation_config.json, licence. A model without a tokenizer gets the one with which the dataset was prepared.

    sequence_length  the length of training, for config.json; None: as the configuration says
    adapters         of the model, which are what is exported; None: its weights are
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: str,
        model_id: str,
        dataset_path: Path | None,
        sequence_length: int | None = None,
        adapters: LoraConfig | None = None,
    ) -> None:
        self._adapters = adapters
        self._config, self._dtype, self._sources = config, dtype, [model_id]
        self._length = sequence_length
        if dataset_path is not None and (dataset_path / PROVENANCE).exists():
            self._sources.append(json.loads((dataset_path / PROVENANCE).read_text())["tokenizer"])

    def __call__(self, folder: Path) -> None:
        self._copy_small_files(folder)
        self._write_config(folder)
        if self._adapters is not None:
            adapters = copy.copy(self._adapters)
            adapters.inference_mode = True  # for those who read it
            adapters.save_pretrained(str(folder))
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            self._save_tokenizer(folder)
        write_older_tokenizer(folder)

    def _write_config(self, folder: Path) -> None:
        config = copy.deepcopy(self._config)
        config.use_cache = True  # it was off for training alone
        config.dtype = self._dtype
        if not config.architectures:
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            config.architectures = [model_class.__name__]
        if self._length is not None:
            set_trained_length(config, self._length)
        write_config(config, folder / "config.json")
        if not (folder / "generation_config.json").exists():
            GenerationConfig.from_model_config(config).save_pretrained(folder)

    def _copy_small_files(self, folder: Path) -> None:
        source = self._directory()
        for path in sorted(source.iterdir()) if source is not None else []:
            weights = any(path.match(pattern) for pattern in WEIGHTS)
            if path.is_file() and not weights and not path.name.startswith("."):
                if path.stat().st_size <= SMALL:
                    shutil.copyfile(path, folder / path.name)
                else:
                    logger.warning("%s has %d MB: checkpoints are without it", path, path.stat().st_size // 10**6)

    def _directory(self) -> Path | None:
        """Where the model's own files are. None where they are on the hub, which cannot be reached."""
        if Path(self._sources[0]).is_dir():
            return Path(self._sources[0])
        from huggingface_hub import snapshot_download

        try:
            ignored = [*WEIGHTS, "*/*"]
            online = hub.reachable()
            return Path(snapshot_download(self._sources[0], ignore_patterns=ignored, local_files_only=not online))
        except Exception as error:  # the client raises whatever the network makes it raise
            logger.warning("checkpoints have no other files of %s: %s", self._sources[0], hub.first_line(error))
            return None

    def _save_tokenizer(self, folder: Path) -> None:
        for source in self._sources:
            try:
                hub.load_tokenizer(source).save_pretrained(folder)
                return
            except UserError:
                continue
        logger.warning("no tokenizer in %s: checkpoints have none", " or ".join(self._sources))
