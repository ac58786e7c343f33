"""The dropout that a base model brings along: GPT-2 and OPT train with 0.1 by their config.json, most others with none.

It acts in training passes only, never in rollouts or measurements. An adapter's own dropout is `student.lora.dropout`
and is not counted here. Knows no configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from qswitch.errors import ModelError

_NAME = re.compile(r"(^|_)p?drop(out)?(_p|_prob)?$")
"""Attributes of modules that apply dropout through a function and keep its probability as a number."""

_HEADS = ("classifier", "summary")
"""Of settings in config.json that belong to other heads than a language model's."""


def dropout_of(model: nn.Module) -> dict[str, float]:
    """Place -> probability of every dropout of the base above 0; an adapter's are left out."""
    return {f"{name}.{key}" if name else key: module.__dict__[key] for name, module, key in _places(model)}


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout of the base this probability; one that is 0 stays out, since the model was made without.

    Raises:
        ModelError: a probability above 0 for a model that has none.
    """
    places = list(_places(model))
    if probability and not places:
        raise ModelError(
            f"student.base_dropout={probability:g}, but {type(model).__name__} has no dropout of its own to set. "
            "Remove it, or set student.lora.dropout for the adapter's."
        )
    for _, module, key in places:
        setattr(module, key, probability)
    config = getattr(model, "config", None)  # Falcon reads it there in every pass
    for key, value in list(vars(config).items()) if config is not None else ():
        if _NAME.search(key) and not key.startswith(_HEADS) and isinstance(value, float) and value > 0:
            setattr(config, key, probability)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        keys = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else filter(_NAME.search, list(vars(module)))
        for key in keys:
            value = vars(module).get(key)
            if isinstance(value, float) and 0 < value < 1:
                yield name, module, key
