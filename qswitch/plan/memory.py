"""How many bytes each part of a run takes, as arithmetic over shapes.

Pure functions; knows no budget and makes no choice (`scheduler.py`). Each docstring states what is assumed. Bytes of
weights, adapters, optimizer and caches are exact up to allocator rounding; activations and workspaces are models of
the transformers and peft implementations, and no figure here has been measured on a GPU.

Letters: `R` rollout rows, `B` training rows, `L` tokens of a row, `V` vocabulary, `D` width, `I` MLP width.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from qswitch.config import LoraSection, TeacherSection
from qswitch.plan.adapters import adapter_settings, find_adapter
from qswitch.plan.shapes import LinearShape, ModelShape
from qswitch.units import GIB

FP32_BYTES = 4

NF4_BLOCK = 64
"""Weights per scale: bitsandbytes' default for 4-bit."""
NF4_NESTED_BLOCK = 256
"""Scales per second-level scale: bitsandbytes' default for double quantisation."""
NF4_TABLE_BYTES = 16 * FP32_BYTES + 256 * FP32_BYTES + FP32_BYTES
"""Per module: the 16 NF4 levels, the 256 levels of the scales, and their offset, all fp32 (bitsandbytes QuantState)."""

CUDA_CONTEXT_BYTES = 512 * 2**20
"""Driver context, cuBLAS handles and workspaces of one process. An allowance, not a measurement: contexts of 300 to
500 MiB are usual, and PyTorch's CUDA notes put a cuBLAS workspace at 8 MiB (32 MiB on Hopper) per handle."""

CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""Of each further stream: the passes of a model are recorded on one of their own. Hopper's, the largest; see above."""

FRAGMENTATION_SHARE = 0.05
"""Of everything that is allocated and freed within a step: the caching allocator rounds sizes up (to 512 bytes, and
to 2 MiB in blocks above 1 MiB) and cannot always reuse a hole. An allowance, not a measurement."""

PROCESS_BYTES = int(0.9 * GIB)
"""Host memory of the Python process beside tensors: 0.59 GiB with its libraries, the demo's tokenizer and data
(resident set, anonymous 0.48 and files 0.11; torch 2.13, transformers 5.23, peft 0.21, Linux), and the 0.3 GiB by which
it grew between steps over the demo's twelve (small blocks of the heap, oneDNN's kernels; docs/architecture.md)."""

PINNED_SLAB_BYTES = 256 * 2**20
"""Piece of a swapped teacher's host copy (models/residency.py)."""

KEPT_BUFFER_BYTES = 256 * 2**20
"""Key-value buffers up to this size, and the passes recorded over them, are kept from one rollout call to the next."""

SLOT_CHUNK = 64
"""The key-value cache is allocated in whole chunks of this many slots."""
ROLLOUT_VOCABULARY_COPIES = 10
"""fp32-sized [R, J, V] tensors alive at once in a round of J steps: log p and log q stay; then either the divergence
(probabilities, mixture, its logarithm, two products: 7 in all), or the noise (log-probabilities that are drawn from,
and hash, shifted copy and mask in int64, 2 each: 9 in all); 1 for the logits that fp32 was made from."""

MAX_AUTO_DRAFTS = 16
"""Longest block that rollout.block_tokens=auto chooses."""
ROUND_SCRATCH_BYTES = 256 * 2**20
ROUND_SCRATCH_BYTES_PER_LOGIT = 36
"""auto drafts no more than what these allow; both as in rollout/block_length.py, which a test compares."""

LOSS_VOCABULARY_COPIES = 8
"""fp32-sized [chunk, V] tensors alive at once in the loss: logits and log-probabilities of teacher and student (4),
the skewed mixture and its logarithm (2), the integrand (1), the gradient with respect to the student's logits (1)."""

CUT_ROW_TOKENS, CUT_ROWS_CHOOSING, CUT_ROWS_CHECKING, CUT_POSITIONS, CUT_CHUNK_POSITIONS = 48, 16, 8, 256, 64
"""Texts on which the layers of a cut are chosen, and then checked; as in models/layer_choice.py and
models/decoder_layers.py, which a test compares."""

Precision = Literal["nf4", "int8", "bf16", "fp32", "stored"]


# ------------------------------------------------------------------------------------------------------------ weights


def nf4_linear_bytes(module: LinearShape, compute_bytes: int, any_width: bool) -> int:
    """One linear layer in NF4 with double quantisation.

    Half a byte per weight, one uint8 scale per 64 weights, one fp32 scale per 256 scales, the tables; the bias in the
    compute dtype. bitsandbytes' CPU kernels need input widths that are multiples of 64, so other layers stay
    unquantised there (`any_width=False`); on CUDA the blocks run over the flattened weight.
    """
    if not any_width and module.in_features % NF4_BLOCK:
        return module.parameters * compute_bytes
    scales = math.ceil(module.weight_parameters / NF4_BLOCK)
    bias_bytes = (module.parameters - module.weight_parameters) * compute_bytes
    packed_bytes = math.ceil(module.weight_parameters / 2)
    return packed_bytes + scales + math.ceil(scales / NF4_NESTED_BLOCK) * FP32_BYTES + NF4_TABLE_BYTES + bias_bytes


def int8_linear_bytes(module: LinearShape, compute_bytes: int) -> int:
    """One linear layer in LLM.int8: a byte per weight and one fp32 scale per output row; the bias in compute dtype."""
    bias_bytes = (module.parameters - module.weight_parameters) * compute_bytes
    return module.weight_parameters + module.out_features * FP32_BYTES + bias_bytes


def linear_bytes(module: LinearShape, precision: Precision, compute_bytes: int, any_width: bool = True) -> int:
    """One linear layer, stored in `precision`."""
    if precision == "nf4":
        return nf4_linear_bytes(module, compute_bytes, any_width)
    if precision == "int8":
        return int8_linear_bytes(module, compute_bytes)
    return module.parameters * other_bytes_per_parameter(precision, compute_bytes)


def other_bytes_per_parameter(precision: Precision, compute_bytes: int) -> int:
    """Bytes of a weight that is not quantised. bf16 means the compute dtype, 4 bytes where that is fp32."""
    return max(compute_bytes, FP32_BYTES) if precision == "fp32" else compute_bytes


@lru_cache(maxsize=64)
def weight_bytes(shape: ModelShape, precision: Precision, compute_bytes: int, any_width: bool = True) -> int:
    """A whole model: linear layers in `precision`; embeddings, positions, norms and head never quantised.

    `stored` are weights as their checkpoint keeps them, by the bits that its config.json tells.
    """
    if precision == "stored":
        return _stored_bytes(shape, compute_bytes)
    linears = sum(n * linear_bytes(m, precision, compute_bytes, any_width) for m, n in shape.counted_linears.items())
    other = shape.other_parameters * other_bytes_per_parameter(precision, compute_bytes)
    return linears + other


def _stored_bytes(shape: ModelShape, compute_bytes: int) -> int:
    weights, inside = shape.linear_weight_parameters, sum(shape.further_by_layer)
    others = (shape.num_parameters - weights - inside) * compute_bytes
    if shape.stored is None:
        return (weights + inside) * compute_bytes + others
    return math.ceil((weights * shape.stored.bits + inside * shape.stored.expert_bits) / 8) + others


def head_bytes(shape: ModelShape, precision: Precision, compute_bytes: int) -> int:
    """The output embedding alone; a tied head is the input embedding."""
    parameters = shape.head_parameters or shape.embedding_parameters
    return parameters * other_bytes_per_parameter(precision, compute_bytes)


def pinned_block_bytes(num_bytes: int) -> int:
    """Host memory of one pinned tensor: torch's allocator rounds up to a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def pinned_bytes(num_bytes: int) -> int:
    """Host memory that a swapped teacher's pinned copy takes: whole slabs, and one block for the rest."""
    whole, rest = divmod(num_bytes, PINNED_SLAB_BYTES)
    return whole * PINNED_SLAB_BYTES + pinned_block_bytes(rest)


def dequantisation_bytes(shape: ModelShape, precision: Precision, compute_bytes: int) -> int:
    """Workspace of a matrix product with a quantised weight: the largest linear layer in the compute dtype.

    Passes over several tokens unpack the whole weight first; one-token passes do not, and are covered by this bound.
    """
    return shape.largest_linear_parameters * compute_bytes if precision in ("nf4", "int8", "stored") else 0


def dora_bytes(shape: ModelShape, lora: LoraSection, compute_bytes: int) -> int:
    """Beside a pass through the widest module with DoRA, all in fp32: the identity of its inputs, the product of both
    adapter matrices, the same scaled, and its sum with the weight, of which a narrower one is copied as well."""
    if not lora.use_dora:
        return 0
    copies = 3 if compute_bytes >= FP32_BYTES else 4
    return FP32_BYTES * max(
        (m.in_features**2 + copies * m.weight_parameters for m, _ in _adapted(shape, lora)), default=0
    )


def head_gradient_bytes(
    shape: ModelShape, adapter: str, lora: LoraSection, compute_bytes: int, parameter_bytes: int
) -> int:
    """Beside the gradients, where the head itself trains: the sum over the chunks of the loss, and the gradient of one
    chunk as it is computed and as it is added (distill/loss.py)."""
    if adapter == "lora" and "lm_head" not in [name.rpartition(".")[2] for name in lora.modules_to_save]:
        return 0
    head = shape.head_parameters or shape.embedding_parameters
    return head * (2 * parameter_bytes + (compute_bytes if compute_bytes < parameter_bytes else 0))


def cut_bytes(shape: ModelShape) -> int:
    """Host memory, at its highest, of cutting a bf16 model to `shape`, which says how much was cut off.

    The whole model, its head and one layer in fp32, and either what choosing takes (three hidden states of every row
    and layer; [256, V] log-probabilities of the whole model and five tensors of a chunk of 64), or what the check of
    the choice does beside the cut model (two hidden states; log-probabilities at every position, and the logits that
    they are made of). All of it on the CPU, whatever the run computes on (models/shrink.py).
    """
    a_layer = max(sum(m.parameters for m in layer) for layer in shape.layers)
    num_layers = shape.num_layers + -(-shape.cut_parameters // a_layer)
    vocabulary_row = shape.vocab_size * FP32_BYTES
    state = CUT_ROW_TOKENS * shape.hidden_size * FP32_BYTES * (num_layers + 1)
    choosing = 3 * CUT_ROWS_CHOOSING * state + (CUT_POSITIONS + 5 * CUT_CHUNK_POSITIONS) * vocabulary_row
    checking = 2 * CUT_ROWS_CHECKING * state + 2 * CUT_ROWS_CHECKING * CUT_ROW_TOKENS * vocabulary_row
    checking += shape.num_parameters * 2
    whole = (shape.num_parameters + shape.cut_parameters) * 2
    return whole + head_bytes(shape, "fp32", FP32_BYTES) + a_layer * FP32_BYTES + max(choosing, checking)


def load_buffer_bytes(shape: ModelShape, precision: Precision, compute_bytes: int) -> int:
    """Beyond the finished weights while loading: the largest tensor as read, and its copy being cast or quantised."""
    packed = precision in ("nf4", "int8", "stored")
    largest = shape.largest_linear_parameters if packed else shape.largest_tensor_parameters
    return 2 * largest * compute_bytes


# ------------------------------------------------------------------------------------------------- trainable weights


def _is_target(module: LinearShape, shape: ModelShape, lora: LoraSection) -> bool:
    """Whether a module gets an adapter. A regular expression counts for each module whose name it spells out."""
    targets = lora.target_modules
    if targets == "all-linear":
        return module.name not in shape.taken_for_experts
    names = re.findall(r"\w+", targets) if isinstance(targets, str) else [t.rpartition(".")[2] for t in targets]
    return module.name in names


def _rank(module: LinearShape, lora: LoraSection) -> int:
    for pattern, rank in lora.rank_pattern.items():
        if re.fullmatch(rf"(.*\.)?{pattern}", module.name):
            return rank
    return lora.r


def _adapted_in_layers(shape: ModelShape, lora: LoraSection) -> tuple[dict[LinearShape, int], int]:
    """How often each module of the layers is adapted, in all, and in how many layers."""
    chosen = lora.layers_to_transform
    if chosen is None:
        counts, num_layers = shape.modules_of_layers, shape.num_layers
    else:
        layers = [shape.layers[i] for i in set(chosen)]
        counts, num_layers = Counter(m for layer in layers for m in layer), len(layers)
    return {module: count for module, count in counts.items() if _is_target(module, shape, lora)}, num_layers


def _adapted(shape: ModelShape, lora: LoraSection) -> Iterator[tuple[LinearShape, int]]:
    """(module, how many of it are adapted)."""
    yield from _adapted_in_layers(shape, lora)[0].items()
    if lora.layers_to_transform is None:
        yield from Counter(m for m in shape.outer_linears if _is_target(m, shape, lora)).items()


def lora_parameters(shape: ModelShape, lora: LoraSection) -> int:
    """Trainable parameters: r * (in + out) per adapted module, its out magnitudes with DoRA, and modules_to_save.

    A name in modules_to_save that is no linear layer and no embedding or head is taken for a full-width norm.
    """
    total = 0
    for module, count in _adapted(shape, lora):
        magnitudes = module.out_features if lora.use_dora else 0
        total += count * (_rank(module, lora) * (module.in_features + module.out_features) + magnitudes)
    if not isinstance(lora.target_modules, str) and "lm_head" in lora.target_modules:
        total += lora.r * (shape.hidden_size + shape.vocab_size)
    for name in lora.modules_to_save:
        last = name.rpartition(".")[2]
        linears = [m for layer in shape.layers for m in layer if m.name == last]
        if linears:
            total += sum(m.parameters for m in linears)
        elif last in ("embed_tokens", "wte", "lm_head"):
            total += shape.embedding_parameters
        else:
            total += (1 if shape.rms_norm else 2) * shape.hidden_size * shape.num_layers
    return total


def trainable_parameters(shape: ModelShape, adapter: str, lora: LoraSection) -> int:
    """Parameters with a gradient: the adapters, or every weight."""
    return lora_parameters(shape, lora) if adapter == "lora" else shape.num_parameters


def attached_adapter_bytes(shape: ModelShape, teacher: TeacherSection, compute_bytes: int) -> int:
    """An adapter that stays beside quantised weights, in the compute dtype; one merged into others takes nothing."""
    if teacher.adapter is None or teacher.precision not in ("nf4", "int8", "stored"):
        return 0
    lora = adapter_settings(find_adapter(teacher.adapter, "teacher.adapter"))
    return lora_parameters(shape, lora) * compute_bytes


def optimizer_bytes(num_trainable: int, optimizer: str, parameter_bytes: int = FP32_BYTES) -> int:
    """AdamW's two moments: 8 bytes per fp32 parameter; one byte each in 8-bit, with an fp32 scale per 256."""
    if optimizer == "paged_adamw_8bit":
        return 2 * (num_trainable + math.ceil(num_trainable / 256) * FP32_BYTES)
    return 2 * num_trainable * parameter_bytes


# -------------------------------------------------------------------------------------------------------------- rollout


def cache_slots(prompt_tokens: int, new_tokens: int, num_drafts: int) -> int:
    """Slots a row of the key-value cache needs for prompts, responses and a block of drafts, in chunks of SLOT_CHUNK.

    A row has read at most prompt_tokens + new_tokens - 2 tokens before its last round, which reads num_drafts + 1 more.
    What the chunk leaves over is room for holes: it saves packing anew.
    """
    return math.ceil((prompt_tokens + new_tokens + num_drafts) / SLOT_CHUNK) * SLOT_CHUNK


def kv_buffer_bytes(shape: ModelShape, rows: int, slots: int, compute_bytes: int) -> int:
    """Keys and values of all layers for R rows of `slots` slots (`cache_slots`), exactly as a rollout allocates them.

    The cache keeps every slot: sliding windows save nothing (see rollout/kv_cache.py).
    """
    return rows * slots * sum(shape.kv_widths) * compute_bytes


def kv_cache_bytes(shape: ModelShape, rows: int, slots: int, compute_bytes: int, *, drafts: bool = False) -> int:
    """All that the cache of one model takes: its buffers; the keys of one layer once more, when rows are packed anew;
    and the states of layers that keep some of a row instead, with `drafts` also as they were when the block began.
    """
    packing = rows * slots * (max(shape.kv_widths, default=0) // 2) * compute_bytes
    states = state_bytes(shape, rows, compute_bytes) * (2 if drafts else 1)
    return kv_buffer_bytes(shape, rows, slots, compute_bytes) + packing + states


def state_bytes(shape: ModelShape, rows: int, compute_bytes: int) -> int:
    """What recurrent and convolution layers keep of R rows."""
    return rows * (shape.state_bytes_per_row + shape.state_values_per_row * compute_bytes)


def forward_bytes(shape: ModelShape, rows: int, tokens: int, compute_bytes: int, adapted: bool = False) -> int:
    """Live at once in a pass without gradients over R rows of L tokens: the widest point of one layer.

    Residual stream, its norm in fp32 and cast back, and the MLP's gate, up and product, with an adapter its share as
    well; or queries, keys, values, their rotated copies and, in eager attention, two copies of the scores and the fp32
    softmax. Against tensors counted in a 22-layer adapted student: 0.24 GiB planned, 0.24 live.
    """
    num_tokens = rows * tokens
    stream = shape.hidden_size * (3 * compute_bytes + FP32_BYTES)
    mlp = ((3 if shape.gated_mlp else 2) + adapted) * shape.intermediate_size * compute_bytes
    attention = (3 * shape.attention_width + 4 * shape.kv_width) * compute_bytes
    return num_tokens * (stream + max(mlp, attention)) + _score_bytes(shape, rows, tokens, compute_bytes)


def recorded_pass_bytes(
    shape: ModelShape, rows: int, tokens: int, compute_bytes: int, unpacked_bytes: int, adapted: bool = False
) -> int:
    """What CUDA graphs of one model hold on the device: the workspace of their stream, and in the pool that they share
    what a pass over R rows of L tokens takes beside the weights, a second time. What the driver keeps of each graph is
    not known and not counted."""
    return CUBLAS_WORKSPACE_BYTES + forward_bytes(shape, rows, tokens, compute_bytes, adapted) + unpacked_bytes


def _score_bytes(shape: ModelShape, rows: int, tokens: int, compute_bytes: int) -> int:
    """Attention scores of one layer where they are materialised: soft-capped, softmax in fp32, cast back."""
    if not shape.eager_attention:
        return 0
    return rows * shape.num_heads * tokens * tokens * (2 * compute_bytes + FP32_BYTES)


def rollout_vocabulary_bytes(rows: int, steps: int, vocab_size: int, accumulate_bytes: int = FP32_BYTES) -> int:
    """Logits, log-probabilities, divergence and noise of one round of R rows and J steps."""
    return ROLLOUT_VOCABULARY_COPIES * rows * steps * vocab_size * accumulate_bytes


def kept_hidden_bytes(hidden_size: int, sequences: int, rows: int, tokens: int, compute_bytes: int) -> int:
    """Teacher hidden states on their way to the cache: one buffer per batch of R rows, and those of a whole step."""
    return (rows + sequences) * tokens * hidden_size * compute_bytes


# ---------------------------------------------------------------------------------------------------------------- cache


def cache_row_bytes(format: str, hidden_size: int, vocab_size: int, topk: int, compute_bytes: int) -> int:
    """One cached token: a hidden state, or k ids (int32), k log-probabilities and the tail (fp32)."""
    if format == "hidden":
        return hidden_size * compute_bytes
    return min(topk, vocab_size) * (4 + FP32_BYTES) + FP32_BYTES


# ------------------------------------------------------------------------------------------------------------- training


def layer_activation_bytes(
    shape: ModelShape, rows: int, tokens: int, compute_bytes: int, adapter: str, lora: LoraSection
) -> int:
    """What one layer saves for its backward pass without checkpointing, over B rows of L tokens.

    Per token, b = bytes of the compute dtype:
    - an RMS norm saves its input in fp32 and the normalised row (b); a layer norm its input (b);
    - fused attention saves queries, keys, values (of all heads) and its output, 4 * heads * head_dim * b;
      eager attention the scores as well;
    - a gated MLP saves gate, act(gate), up: 3 I b; a plain one 2 I b, or 4 with gelu_new (`saved_mlp_tensors`);
    - every adapted module saves its input for the adapter, in fp32 (peft casts it, once per module, unless the compute
      dtype is fp32 and the input is shared), and its r-wide middle in fp32; dropout saves a mask and a scaled copy;
    - with every weight trained, each distinct linear input is saved once (b).
    Frozen linear layers save nothing of their input. tests/plan/test_memory.py compares this with what autograd saves
    in small models: between the same and 20 % more.
    """
    b, width = compute_bytes, shape.hidden_size
    if shape.rms_norm:
        # The cast makes a copy only where the compute dtype is narrower than fp32.
        norm = width * ((FP32_BYTES if b < FP32_BYTES else 0) + 2 * b)
    else:
        norm = 2 * width * b
    per_token = shape.num_layer_norms * norm
    per_token += 4 * shape.attention_width * b
    per_token += shape.saved_mlp_tensors * shape.intermediate_size * b
    if adapter == "lora":
        shared = b >= FP32_BYTES
        inputs: set[int] = set()
        adapted, num_layers = _adapted_in_layers(shape, lora)
        for module, count in adapted.items():
            saved = 0 if shared else module.in_features * FP32_BYTES
            if shared:
                inputs.add(module.in_features)
            if lora.dropout:
                saved += module.in_features * (FP32_BYTES + 1)
            saved += _rank(module, lora) * FP32_BYTES
            if lora.use_dora:
                saved += 2 * module.out_features * FP32_BYTES
            per_token += math.ceil(saved * count / num_layers)
        per_token += sum(inputs) * b
    else:
        per_token += (shape.attention_width + shape.intermediate_size) * b
    return rows * tokens * per_token + _score_bytes(shape, rows, tokens, compute_bytes)


def activation_bytes(
    shape: ModelShape,
    rows: int,
    tokens: int,
    compute_bytes: int,
    adapter: str,
    lora: LoraSection,
    gradient_checkpointing: bool,
) -> int:
    """Saved for the whole backward pass, and the gradients in flight in one layer.

    With checkpointing each layer keeps its input, and one layer at a time is recomputed. In flight: the gradient of the
    stream and of the widest tensors of a layer.
    """
    layer = layer_activation_bytes(shape, rows, tokens, compute_bytes, adapter, lora)
    stream = rows * tokens * shape.hidden_size * compute_bytes
    in_flight = 2 * stream + (3 if shape.gated_mlp else 2) * rows * tokens * shape.intermediate_size * compute_bytes
    if gradient_checkpointing:
        return stream * (shape.num_layers + 1) + layer + in_flight
    return layer * shape.num_layers + stream + in_flight


def loss_chunk_bytes(
    positions: int,
    chunk_tokens: int,
    vocab_size: int,
    accumulate_bytes: int = FP32_BYTES,
    *,
    differs_by_writer: bool = False,
) -> int:
    """[chunk, V] tensors of one chunk of loss positions; rows of different divergences are copied apart first."""
    copies = LOSS_VOCABULARY_COPIES + (2 if differs_by_writer else 0)
    return min(positions, chunk_tokens) * vocab_size * accumulate_bytes * copies
