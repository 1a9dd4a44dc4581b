"""Configurations of models: from a directory, from the Hugging Face hub, or bundled here for use without a network."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from nnscaler import hub
from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

BUNDLED = {f"meta-llama/{path.stem}": path for path in sorted(Path(__file__).parent.glob("*.json"))}


def load_config(model_id: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        model_id: a directory with a config.json, or the name of a model on the hub. Where the hub cannot be reached, or
            does not let us read the model, the local cache and then the configurations bundled here stand in.

    Raises:
        UserError: there is no such configuration, or it is damaged.
    """
    if Path(model_id).is_dir():
        if not Path(model_id, "config.json").is_file():
            raise UserError(f"{model_id} is not a model: it has no config.json")
        return _load(model_id, online=False)
    online = hub.reachable()
    try:
        return _load(model_id, online)
    except UserError as error:
        if model_id not in BUNDLED:
            reason = str(error) if online else f"no such directory: {model_id}; the Hugging Face hub cannot be reached"
            raise UserError(
                f"{reason}{_nearest(Path(model_id))}; the configurations that come with this package are "
                f"{', '.join(BUNDLED)}"
            ) from error
    reason = "the hub does not give it to us" if online else "the hub cannot be reached"
    logger.warning("%s: using the bundled configuration, because %s", model_id, reason)
    values = json.loads(BUNDLED[model_id].read_text(encoding="utf-8"))
    return AutoConfig.for_model(**values)


def _nearest(path: Path) -> str:
    """A question whether a model beside this path is meant; nothing where none has a name like its."""
    models = []
    with contextlib.suppress(OSError):
        models = [model.parent.name for model in path.parent.glob("*/config.json")]
    near = difflib.get_close_matches(path.name, sorted(models), n=1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def marks_of(config: PretrainedConfig) -> dict[str, list[int]]:
    """The ids that a configuration gives to "bos" and "eos", of which some models have several; none where it does
    not say."""
    found = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos")}
    return {name: ids if isinstance(ids, list) else [ids] for name, ids in found.items() if ids is not None}


def _load(model_id: str, online: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(model_id, local_files_only=not online, **hub.NO_CODE)
    except Exception as error:  # the loader raises whatever the damaged file makes it raise
        raise UserError(f"cannot load the configuration of {model_id}: {hub.why_not_loaded(error)}") from error
