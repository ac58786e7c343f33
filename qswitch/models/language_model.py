"""What the rest of qswitch sees of a transformers causal model: hidden states, and the head that makes logits of them.

Knows nothing of files, of precision or of adapters; it wraps whatever module `load.py` or `student.py` built. Shape
letters: `B` rows, `n` tokens of this pass, `D` hidden width, `V` shared vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qswitch.errors import ModelError
from qswitch.models.architecture import backbone, check_architecture
from qswitch.models.attention import while_decoding


class Head(nn.Module):
    """The output projection of a causal model with its scale and soft-cap, sliced to the shared vocabulary.

    The linear layer is referenced, not registered: it is a part of the model (often tied to its input embedding), which
    owns the parameters, so state dicts and optimizers see them once.
    """

    def __init__(
        self,
        linear: nn.Module,
        *,
        vocab_size: int | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows = output_rows(linear)
        if vocab_size is not None and not 0 < vocab_size <= rows:
            raise ModelError(f"The shared vocabulary has {vocab_size} ids, but the model's head has only {rows} rows.")
        self._linear = (linear,)  # in a tuple, so that nn.Module does not register it
        self.vocab_size = vocab_size or rows
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.compute_dtype = compute_dtype
        self._casts = casts_weight(linear.weight, compute_dtype)

    @property
    def linear(self) -> nn.Module:
        """The model's output embedding: Linear, a 4- or 8-bit linear, or one wrapped by an adapter."""
        return self._linear[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last norm -> logits: [..., D] -> [..., V]."""
        with _autocast(self._casts, self.compute_dtype, hidden.device):
            logits = self.linear(hidden)[..., : self.vocab_size]
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class LanguageModel(nn.Module):
    """One transformers causal model (`hf`, maybe with peft adapters in it), its head apart.

    Args:
        hf: a PreTrainedModel with a causal head, or a PeftModel around one.
        vocab_size: number of ids of the shared vocabulary; None keeps every row of the head.
        compute_dtype: arithmetic of the passes. Where weights are kept in fp32 and this is bf16, passes run under
            autocast; a single such module that trains beside adapters is enough. None: the dtype of the weights.

    Raises:
        ModelError: rollouts cannot decode the architecture (`architecture.py` says which).
    """

    def __init__(
        self, hf: nn.Module, *, vocab_size: int | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.hf = hf
        causal = self.causal_model
        check_architecture(causal)
        linear = causal.get_output_embeddings()
        self.compute_dtype = compute_dtype or linear_dtype(linear)
        # With adapters the head may be narrow and a module beside them wide, which only autocast brings together.
        self._casts = any(casts_weight(w, self.compute_dtype) for w in (linear.weight, *_trained_whole(hf)))
        scale, softcap = _logit_transform(causal.config)
        self.head = Head(
            linear, vocab_size=vocab_size, logit_scale=scale, softcap=softcap, compute_dtype=self.compute_dtype
        )
        self.train(hf.training)

    @property
    def causal_model(self) -> Any:
        """The transformers model itself, with adapters still injected where there are any."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    @property
    def config(self) -> Any:
        """The transformers configuration of the model."""
        return self.causal_model.config

    @property
    def backbone(self) -> nn.Module:
        """The model below its head."""
        return backbone(self.causal_model)

    @property
    def vocab_size(self) -> int:
        """V, the number of ids both models can produce."""
        return self.head.vocab_size

    @property
    def device(self) -> torch.device:
        """Where passes begin and end; of layers that wait elsewhere for their turn it is the place of the turn."""
        first = next(self.hf.parameters()).device
        return torch.device(self.hf._hf_hook.execution_device) if first.type == "meta" else first

    @property
    def generation_eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a response, as the model's own generation config has them; may be empty."""
        causal = self.causal_model
        for source in (getattr(causal, "generation_config", None), causal.config):
            eos = getattr(source, "eos_token_id", None)
            if eos is not None:
                return tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        return ()

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Token ids [B, n] -> hidden states after the last norm [B, n, D], in the compute dtype.

        `past_key_values` is a transformers cache, extended in place. `use_cache` defaults to whether one is given.
        Remaining keywords go to the backbone.
        """
        decoding = contextlib.nullcontext() if past_key_values is None else while_decoding(self.config)
        with decoding, _autocast(self._casts, self.compute_dtype, input_ids.device):
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None if use_cache is None else use_cache,
                return_dict=True,
                **kwargs,
            )
        hidden = output.last_hidden_state
        return hidden if hidden.dtype == self.compute_dtype else hidden.to(self.compute_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.head(hidden)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Tensor | None = None) -> Tensor:
        """Token ids [B, n] -> hidden states [B, n, D]; the loss projects only the positions it needs."""
        return self.hidden(input_ids, attention_mask, position_ids)


@torch.no_grad()
def verify_head(model: LanguageModel) -> None:
    """Prove on a probe that head(hidden(x)) is the model's own logits, and that the model looks only to the left.

    Raises:
        ModelError: it is not so; names the architecture.
    """
    name = type(model.causal_model).__name__
    was_training = model.training
    model.eval()
    try:
        ids = torch.arange(8, device=model.device).reshape(1, -1) % model.vocab_size
        changed = ids.clone()
        changed[0, -1] = (ids[0, -1] + 1) % model.vocab_size
        mask = torch.ones_like(ids)
        positions = torch.arange(ids.shape[1], device=model.device).reshape(1, -1)
        with _autocast(model._casts, model.compute_dtype, model.device):
            expected = model.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits[..., : model.vocab_size]
        logits = model.logits(model.hidden(ids, mask, positions))
        after = model.logits(model.hidden(changed, mask, positions))
    finally:
        model.train(was_training)
    if not torch.isfinite(expected).all():
        raise ModelError(f"{name}: its weights give NaN or infinite logits. Download or convert the model again.")
    # LLM.int8 multiplies in fp16 and picks its outlier columns over all rows at once, so rows see each other a little.
    is_int8 = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    tolerance = 2e-2 if is_int8 or model.compute_dtype in (torch.bfloat16, torch.float16) else 1e-4
    scale = max(expected.float().abs().max().item(), 1.0)
    difference = (logits.float() - expected.float()).abs().max().item()
    if not difference <= tolerance * scale:
        raise ModelError(
            f"{name}: its logits are not its output embedding applied to its last hidden state (largest difference "
            f"{difference:.3g} on a probe), so qswitch cannot distil this architecture. Use another model family."
        )
    leak = (after[:, :-1].float() - logits[:, :-1].float()).abs().max().item()
    if not leak <= tolerance * scale:
        if is_int8:
            raise ModelError(
                f"{name} in int8: LLM.int8 picks its outlier columns over all tokens of all rows at once, so a token "
                f"changes with those behind and beside it (by {leak / scale:.1%} of the largest logit on a probe), "
                "and a rollout would depend on its batch. Set precision=nf4 or bf16."
            )
        raise ModelError(f"{name} lets earlier tokens see later ones: it is an encoder. Use a decoder-only model.")


def output_rows(linear: nn.Module) -> int:
    """Number of rows (ids) of an output embedding, also where its weight is packed or wrapped."""
    for module in (linear, getattr(linear, "base_layer", None), getattr(linear, "original_module", None)):
        rows = getattr(module, "out_features", None)
        if rows is not None:
            return int(rows)
    return int(linear.weight.shape[0])


def linear_dtype(linear: nn.Module) -> torch.dtype:
    """Floating dtype of a linear layer; of a packed 4-bit or 8-bit one its compute dtype."""
    weight = linear.weight
    if weight.is_floating_point():
        return weight.dtype
    return getattr(linear, "compute_dtype", None) or torch.float32


def casts_weight(weight: Tensor, compute_dtype: torch.dtype | None) -> bool:
    """Whether a weight is kept in fp32 while the arithmetic is narrower, so that passes run under autocast."""
    return compute_dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32


def _trained_whole(hf: nn.Module) -> list[nn.Parameter]:
    """The weights that peft keeps beside adapters as copies of the base's: those of `modules_to_save`."""
    if not hasattr(hf, "peft_config"):
        return []
    from peft.utils import ModulesToSaveWrapper

    copies = [module.modules_to_save for module in hf.modules() if isinstance(module, ModulesToSaveWrapper)]
    return [weight for copy in copies for weight in copy.parameters()]


def _autocast(casts: bool, compute_dtype: torch.dtype | None, device: torch.device) -> Any:
    return torch.autocast(device.type, dtype=compute_dtype) if casts else contextlib.nullcontext()


@contextlib.contextmanager
def weights_cast_once(model: LanguageModel) -> Iterator[None]:
    """Within the block the linear layers of a model that trains all its weights hold copies in the compute dtype.

    Autocast would make the same copies anew in every pass: of a model of N parameters it reads 4 N bytes and writes 2 N
    for each token that is decoded. What a pass computes is the same bit for bit; embeddings and norms stay in fp32, a
    head that is tied to the embedding as well as others gets a copy of its own. Nothing for other models: adapters are
    small, and passes that were recorded as CUDA graphs read them in their place after the block.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    trains_all = model._casts and not hasattr(model.hf, "peft_config")
    for module in model.hf.modules() if trains_all else ():
        if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad:
            kept += [
                (module, n, p) for n, p in module._parameters.items() if p is not None and p.dtype == torch.float32
            ]
    try:
        for module, name, parameter in kept:
            module._parameters[name] = nn.Parameter(parameter.detach().to(model.compute_dtype), requires_grad=False)
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, soft-cap) that the architecture applies to its logits: Cohere multiplies, Granite divides, Gemma caps."""
    scale = 1.0
    if isinstance(getattr(config, "logit_scale", None), int | float):
        scale = float(config.logit_scale)
    if isinstance(getattr(config, "logits_scaling", None), int | float):
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)
