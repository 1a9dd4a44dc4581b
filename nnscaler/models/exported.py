"""config.json and tokenizer_config.json in a form that every reader understands: transformers 5 and 4, vLLM, llama.cpp.

transformers 5 has renamed fields (`rope_parameters`, `dtype`), and leaves out those that have its own default values. A
program that reads older names takes its own defaults instead, and says nothing. So both names are written, and every
value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

# Names that some kinds of models had for parts of `rope_parameters`.
_OLDER_NAMES = {"gpt_neox": {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}}


def write_config(config: PretrainedConfig, path: Path) -> None:
    """Writes config.json: all fields, with RoPE and type under their names in transformers 5 and in transformers 4."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    fields["torch_dtype"] = fields["dtype"]
    rope: dict[str, Any] = dict(fields.get("rope_parameters") or {})
    if isinstance(rope.get("sliding_attention"), dict):  # layers of two kinds
        fields["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
        rope = dict(rope.get("full_attention") or {})
        fields.update(_older_rope(rope, nested=True))
    elif rope:
        fields.update(_older_rope(rope, nested=False))
    for old, new in _OLDER_NAMES.get(config.model_type, {}).items():
        if new in rope:
            fields[old] = rope[new]
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _older_rope(rope: dict[str, Any], nested: bool) -> dict[str, Any]:
    """The fields of transformers 4 for `rope_parameters`: rope_theta and, where RoPE is scaled, rope_scaling."""
    older: dict[str, Any] = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in older}
    if nested or scaling.get("rope_type", "default") == "default":
        # transformers 5 takes a rope_scaling before rope_parameters, of which it would know one kind of layers only.
        return older
    return {**older, "rope_scaling": scaling}


def write_older_tokenizer(folder: Path) -> None:
    """Makes transformers 4 read a tokenizer that transformers 5 wrote, and find its chat template."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") in ("TokenizersBackend", None) and (folder / "tokenizer.json").exists():
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields.setdefault("additional_special_tokens", fields.pop("extra_special_tokens"))
    template = folder / "chat_template.jinja"
    if template.is_file():
        fields.setdefault("chat_template", template.read_text(encoding="utf-8"))
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
