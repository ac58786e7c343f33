"""How big each tensor of a model is. Knows nothing of precisions, batches, devices or files.

The values come from a table of families (`families.py`), or are counted in transformers' class (`counted.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from qswitch.plan.stored import StoredQuantisation


@dataclass(frozen=True)
class LinearShape:
    """One linear module (or GPT-2 Conv1D); `name` is its last path component, as LoRA targets spell it."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def weight_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def parameters(self) -> int:
        return self.weight_parameters + (self.out_features if self.bias else 0)


@dataclass(frozen=True)
class ModelShape:
    """The tensors of a decoder-only model: `num_layers` equal layers between an embedding and a head."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    layer_linears: tuple[LinearShape, ...]
    """Linear modules of one layer."""
    layer_norm_parameters: int
    """Norm weights and biases of one layer."""
    outer_linears: tuple[LinearShape, ...]
    """Linear modules outside the layers and the head (OPT's projections of narrow embeddings)."""
    embedding_parameters: int
    """Token embedding."""
    position_parameters: int
    """Learned positions; 0 with rotary positions."""
    final_norm_parameters: int
    head_parameters: int
    """Weights of an untied head, and its bias; a tied head's weights count once, as the embedding."""
    tied: bool
    gated_mlp: bool
    """Two parallel MLP inputs, act(gate) * up, as in Llama."""
    saved_mlp_tensors: int
    """Tensors of MLP width that one layer saves for its backward pass, the input of its last linear layer aside."""
    rms_norm: bool
    num_layer_norms: int
    """Norms over the full width in one layer."""
    eager_attention: bool = False
    """Scores are materialised (attention soft-cap), not fused."""
    max_positions: int = 0
    cut_parameters: int = 0
    """Parameters of layers that are read with the model and then dropped: while it is loaded it is still whole."""

    counted: bool = False
    """Whether the modules were counted in transformers' class, and activations follow from them roughly."""

    # What only models have whose layers differ, or that were counted.
    unequal_layers: tuple[tuple[LinearShape, ...], ...] = ()
    """Linear modules of every layer where layers differ; empty where each has `layer_linears`."""
    further_by_layer: tuple[int, ...] = ()
    """Parameters of each layer that are in no linear module: norms, experts kept as one tensor, convolutions."""
    further_parameters: int = 0
    """Outside the layers, of none of the kinds named above: a final norm, a vision tower."""
    largest_further_tensor: int = 0
    """Parameters of the largest tensor among them."""
    cached_widths: tuple[int, ...] | None = None
    """Keys and values of a token in each layer that keeps any, numbers; None: every layer keeps 2 * kv_width."""
    state_bytes_per_row: int = 0
    """Recurrent states of a row, whatever its length, all layers; in fp32 whatever the model computes in."""
    state_values_per_row: int = 0
    """The same of states in the type that the model computes in, those of convolutions: numbers."""
    stored: StoredQuantisation | None = None
    """How the checkpoint's weights are quantised already, by its config.json."""
    taken_for_experts: tuple[str, ...] = ()
    """Linear modules whose names mean to peft the experts kept as one tensor, so that no adapter goes on them."""

    @cached_property
    def layers(self) -> tuple[tuple[LinearShape, ...], ...]:
        """Linear modules, layer by layer."""
        return self.unequal_layers or (self.layer_linears,) * self.num_layers

    @cached_property
    def modules_of_layers(self) -> Mapping[LinearShape, int]:
        """Each linear module of the layers -> how often it is there, in all."""
        return Counter(module for layer in self.layers for module in layer)

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every linear module but the head."""
        return tuple(module for layer in self.layers for module in layer) + self.outer_linears

    @cached_property
    def counted_linears(self) -> Mapping[LinearShape, int]:
        """Each linear module but the head -> how often it is there."""
        return Counter(self.linears)

    @cached_property
    def linear_names(self) -> tuple[str, ...]:
        """Names of the linear modules, each once, in the order of the model."""
        return tuple(dict.fromkeys(module.name for module in self.linears))

    @cached_property
    def linear_weight_parameters(self) -> int:
        return sum(m.weight_parameters for m in self.linears)

    @property
    def norm_parameters(self) -> int:
        return self.layer_norm_parameters * self.num_layers + self.final_norm_parameters

    @cached_property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return sum(m.parameters for m in self.linears) + self.other_parameters

    @property
    def other_parameters(self) -> int:
        """Parameters outside the linear modules that a quantiser converts: embeddings, positions, norms, head."""
        named = self.embedding_parameters + self.position_parameters + self.norm_parameters + self.head_parameters
        return named + self.further_parameters + sum(self.further_by_layer)

    @cached_property
    def largest_linear_parameters(self) -> int:
        return max(m.weight_parameters for m in self.linears)

    @property
    def largest_tensor_parameters(self) -> int:
        return max(self.largest_linear_parameters, self.embedding_parameters, self.largest_further_tensor)

    @property
    def attention_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @cached_property
    def kv_widths(self) -> tuple[int, ...]:
        """Numbers of keys and values that each layer keeps of a token."""
        return (2 * self.kv_width,) * self.num_layers if self.cached_widths is None else self.cached_widths

    def with_layers(self, num_layers: int) -> ModelShape:
        """The same model cut to `num_layers` layers; where they differ, as if to the first."""
        cut = replace(self, num_layers=num_layers)
        if self.unequal_layers:
            cut = replace(
                cut,
                unequal_layers=self.layers[:num_layers],
                further_by_layer=self.further_by_layer[:num_layers],
                cached_widths=None if self.cached_widths is None else self.cached_widths[:num_layers],
                state_bytes_per_row=self.state_bytes_per_row * num_layers // self.num_layers,
                state_values_per_row=self.state_values_per_row * num_layers // self.num_layers,
            )
        return replace(cut, cut_parameters=self.num_parameters - cut.num_parameters)


def shared_context(*shapes: ModelShape) -> int | None:
    """Tokens of prompt and response that all of these models take; None where none says how many."""
    return min((shape.max_positions for shape in shapes if shape.max_positions), default=None)
