"""What a written model folder needs to be read as it is meant by transformers 4 and by programs that know its files.

transformers 5 writes all rotary settings as `rope_parameters`, which version 4 ignores: it takes the base of 10,000
without a word, and every position is wrong. It also writes a tokenizer class that version 4 lacks, and a list where
version 4 expects a table. So the older keys are written beside the newer ones; version 5 reads both to the same values.
Where version 4 stopped (4.57) is the reference. Knows no weights, and no run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_WHOLE, _SLIDING = "full_attention", "sliding_attention"
_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Of rotary positions, as far as version 4 has them; a family with another one it does not have either."""
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def add_older_keys(folder: Path) -> None:
    """Complete config.json and tokenizer_config.json of a folder, as far as it has them.

    Raises:
        OSError: a file cannot be written.
    """
    for name, completed in ((CONFIG, _config), (TOKENIZER_CONFIG, _tokenizer_config)):
        path = folder / name
        if path.is_file():
            values = completed(json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    older = _rope(values)
    if isinstance(values.get("dtype"), str):
        older["torch_dtype"] = values["dtype"]
    return {**values, **older}


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, partial_rotary_factor, rope_scaling, rope_local_base_freq, as far as `rope_parameters` says them."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    kinds = {kind: one for kind, one in rope.items() if isinstance(one, Mapping)}
    whole = kinds.get(_WHOLE, {}) if kinds else rope
    kind = whole.get("rope_type", "default")
    if kind not in _KINDS:
        return {}
    older = {key: whole[key] for key in ("rope_theta", "partial_rotary_factor") if whole.get(key) is not None}
    if kind != "default":
        older["rope_scaling"] = _scaling(values, whole)
    local = kinds.get(_SLIDING, {}).get("rope_theta")
    if local is not None and local != whole.get("rope_theta"):
        older["rope_local_base_freq"] = local
    return older


def _scaling(values: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """The setting of stretched positions, without what stands beside it in the older spelling."""
    beside = {"rope_theta", "partial_rotary_factor"}
    if "original_max_position_embeddings" in values:
        beside.add("original_max_position_embeddings")
    scaling = {key: value for key, value in rope.items() if key not in beside}
    if scaling["rope_type"] == "longrope":  # Phi 3 counts three keys, the first by its oldest name
        scaling = {"type": scaling.pop("rope_type"), **scaling}
    return scaling


def _tokenizer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    completed = dict(values)
    if values.get("tokenizer_class") in _CLASSES:
        completed["tokenizer_class"] = _CLASSES[values["tokenizer_class"]]
        # The class that version 4 has makes token types too, which no decoder takes.
        completed.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(values.get("extra_special_tokens"), list):
        completed["additional_special_tokens"] = completed.pop("extra_special_tokens")
    return completed
