"""Can rollouts decode a model: what its class takes, which kinds of layers it has, what each of them remembers.

Rows of a batch advance by different amounts, so what a layer remembers must be something that can be masked slot by
slot (keys and values) or copied row by row (recurrent and convolution states). Knows no weights.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from qswitch.errors import ModelError
from qswitch.models.messages import explained, quiet

try:
    from transformers.cache_utils import DummyLayer
except ImportError:
    # Before transformers 5.23, which keeps nothing of a layer without a past, or a state that stays empty.
    class DummyLayer:  # type: ignore[no-redef]
        """A layer that remembers nothing; here a name for what no cache of this transformers holds."""


Sees = Callable[[Tensor, Tensor], Tensor]
"""(positions of the slots, positions of the queries), broadcast together -> which slots are near enough."""
RECURRENT = ("linear_attention", "conv")
"""Kinds without slots: all they remember is one state a row."""
_WITHOUT_PAST = ("moe", "mlp", "dummy")
_TWO_IN_ONE = {
    "hybrid": ("full_attention", "linear_attention"),
    "hybrid_sliding": ("sliding_attention", "linear_attention"),
}
HYBRID_LAYERS = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
_KEPT = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, *HYBRID_LAYERS, DummyLayer)
_REMEDY = "Use a model with full, sliding-window, chunked, linear or convolution layers."


def backbone(causal: Any) -> nn.Module:
    """The part of a transformers causal model below its head."""
    base = causal.base_model
    return causal.get_decoder() if base is causal else base


def on_meta(config: Any, name: str, trust_remote_code: bool = False) -> Any:
    """The causal model of a configuration without any weights, on the meta device, seen to be one we can decode.

    Raises:
        ModelError: transformers makes none of it, or rollouts cannot decode it; names the model and says why.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet(), explained(name, "model"):
        causal = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    check_architecture(causal)
    return causal


def check_architecture(causal: Any) -> None:
    """See that a causal model, on the meta device or with its weights, is one that rollouts can decode.

    Raises:
        ModelError: it is not; says why.
    """
    name = type(causal).__name__
    if causal.get_output_embeddings() is None:
        raise ModelError(f"{name} has no output embedding, so it is no decoder-only language model.")
    taken = inspect.signature(backbone(causal).forward).parameters
    for needed, reason in (
        ("position_ids", "rows of different length need their own positions in a batch"),
        ("past_key_values", "a rollout reads every token once and goes on from what the model remembers"),
    ):
        if needed not in taken:
            raise ModelError(f"{name} takes no {needed}, but {reason}. Use another model family.")
    layer_kinds(causal.config, name)
    cache_layers(causal.config, name)


def layer_kinds(config: Any, name: str) -> dict[str, Sees | None]:
    """Kind of layer, as the configuration names it -> which slots are near enough for it; None: all of them.

    Raises:
        ModelError: a kind that no mask over slots can express.
    """
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    chunk = getattr(config, "attention_chunk_size", None)
    known: dict[str, Sees | None] = {"full_attention": None, **dict.fromkeys(RECURRENT)}
    if window is not None:
        known["sliding_attention"] = _within(window)
    if chunk is not None:
        known["chunked_attention"] = _same_chunk(chunk)
    named = getattr(config, "layer_types", None)
    if not named:
        named = ["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"]
    kinds = {part for kind in named for part in _TWO_IN_ONE.get(kind, (kind,))} - set(_WITHOUT_PAST)
    unknown = kinds - set(known)
    if unknown:
        raise ModelError(
            f"{name} has layers of the kind {', '.join(sorted(unknown))}, whose past cannot be masked slot by slot. "
            f"{_REMEDY}"
        )
    return {kind: known[kind] for kind in sorted(kinds)}


def cache_layers(config: Any, name: str) -> list[Any]:
    """What transformers itself would remember of each layer.

    Raises:
        ModelError: a layer remembers something else than keys, values and states.
    """
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    other = sorted({type(layer).__name__ for layer in layers if type(layer) not in _KEPT})
    if other:
        raise ModelError(f"{name} remembers its past as {', '.join(other)}, which cannot be kept row by row. {_REMEDY}")
    return layers


@contextlib.contextmanager
def plain_experts(hf: Any) -> Iterator[None]:
    """Experts one by one: the grouped product, which is the usual way, has no fp64."""
    causal = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
    before = causal.config._experts_implementation
    causal.set_experts_implementation("eager")
    try:
        yield
    finally:
        causal.set_experts_implementation(before)


def _within(window: int) -> Sees:
    return lambda slots, queries: slots > queries - window


def _same_chunk(size: int) -> Sees:
    return lambda slots, queries: slots // size == queries // size
