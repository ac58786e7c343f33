"""The decoder layers of a transformers causal model, one at a time, and how far the output is without some of them.

Knows nothing of which layers should go. Shape letters: `B` rows, `L` tokens of the longest row, `D` hidden width, `N`
scored positions, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qswitch.errors import ModelError
from qswitch.models.language_model import LanguageModel

NARROW = (torch.bfloat16, torch.float16)
CHUNK_POSITIONS = 64
"""Positions projected to the vocabulary at a time."""


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A text as token ids, and where its scored part begins."""

    ids: tuple[int, ...]
    first: int = 0
    """Index of the first position whose next-token distribution is compared."""


def find_layers(hf: Any) -> tuple[str, nn.ModuleList]:
    """(name, module list) of the decoder layers: the outermost list that is as long as the config says.

    Raises:
        ModelError: there is none.
    """
    expected = hf.config.get_text_config().num_hidden_layers
    found = [(n, m) for n, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == expected]
    if not found:
        raise ModelError(f"{type(hf).__name__}: no list of {expected} decoder layers found, so it cannot be cut.")
    return min(found, key=lambda item: item[0].count("."))


class LayerStack:
    """A model taken apart on some texts: every layer can be run by itself, and any selection of them scored.

    What a layer is given besides the hidden state (mask, rotary angles and whatever else its family passes) is recorded
    in one ordinary pass and given to it again. Rows are padded on the right, which nothing before it sees. To be used
    inside `computing_in_fp32`.

    Args:
        hf: a PreTrainedModel with a causal head.
        rows: the texts; positions from `first` on are scored.
        max_positions: as many positions are scored at most, evenly spread over all rows.

    Raises:
        ModelError: the layers are not found, or running them one at a time is not what the model does.
    """

    def __init__(self, hf: Any, rows: Sequence[ScoredRow], *, max_positions: int) -> None:
        self._hf = hf
        self._name, self._layers = find_layers(hf)
        self._head = LanguageModel(hf, compute_dtype=torch.float32).head
        self._ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long, device=hf.device)
        positions = []
        for index, row in enumerate(rows):
            self._ids[index, : len(row.ids)] = torch.tensor(row.ids)
            positions += [(index, column) for column in range(row.first, len(row.ids))]
        chosen = torch.linspace(0, len(positions) - 1, min(max_positions, len(positions))).round().long().tolist()
        self._positions = torch.tensor([positions[i] for i in chosen]).T  # (2, N)
        self._arguments: list[tuple[tuple, dict]] = []
        self._returns_tuple: list[bool] = []
        embedded, expected = self._record()
        self.states = self.through(range(len(self)), embedded)
        """[B, L, D] that each layer of the whole model reads, by its index, and what the last one returns, by their
        number."""
        found = self._finish(self.states[len(self)])
        scale = max(expected.abs().max().item(), 1.0)
        if not (found - expected).abs().max().item() <= 1e-3 * scale:
            raise ModelError(
                f"{type(hf).__name__}: its layers pass each other more than the hidden state, so it cannot be cut. "
                "Use a smaller model of the family as the student."
            )
        self._log_p = torch.log_softmax(self._logits(expected), dim=-1)  # (N, V)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def num_positions(self) -> int:
        """N, the number of scored positions."""
        return self._positions.shape[1]

    def through(self, layers: Iterable[int], hidden: Tensor) -> dict[int, Tensor]:
        """`hidden` [B, L, D] sent through these layers: what each of them reads, by its index, and what the last one
        returns, by the number of layers of the whole model."""
        states = {}
        for index in layers:
            states[index] = hidden
            arguments, keywords = self._arguments[index]
            output = self._layers[index](hidden, *arguments, **keywords)
            hidden = output[0] if isinstance(output, tuple) else output
        return states | {len(self): hidden}

    def kl_nats(self, last: Tensor) -> float:
        """Mean KL(model || model whose last layer returns `last` [B, L, D]) over the scored positions, nats."""
        hidden = self._finish(last)
        total = 0.0
        for log_p, part in zip(self._log_p.split(CHUNK_POSITIONS), hidden.split(CHUNK_POSITIONS), strict=True):
            logits = self._logits(part)
            # sum of p (log p - log q); kl_div would build two more tensors of this size
            log_q = torch.log_softmax(logits, dim=-1)
            total += float(((log_p - log_q) * log_p.exp()).sum(dim=-1).double().sum())
        return total / self.num_positions

    def _record(self) -> tuple[Tensor, Tensor]:
        """One pass of the model, remembering what its layers are given besides the hidden state.

        Returns what the first layer reads [B, L, D], and the final hidden states [N, D].
        """
        embedded: list[Tensor] = []

        def remember(_layer: nn.Module, arguments: tuple, keywords: dict) -> None:
            keywords = dict(keywords)
            hidden, rest = (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
            if not embedded:
                embedded.append(hidden)
            self._arguments.append((rest, keywords))

        def remember_kind(_layer: nn.Module, _arguments: tuple, output: Any) -> None:
            self._returns_tuple.append(isinstance(output, tuple))

        handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self._layers]
        handles += [layer.register_forward_hook(remember_kind) for layer in self._layers]
        try:
            hidden = self._hf.base_model(input_ids=self._ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return embedded[0], hidden[tuple(self._positions)].float()

    def _finish(self, last: Tensor) -> Tensor:
        """What the model makes of its last layer's output, at the scored positions: [B, L, D] -> [N, D].

        The model runs with stand-ins for its layers, all of which return `last`, so whatever follows them follows here.
        """
        parent = self._hf.get_submodule(self._name.rpartition(".")[0])
        attribute = self._name.rpartition(".")[2]
        stand_ins = [_StandIn(layer, (last,) if tuple_ else last)
                     for layer, tuple_ in zip(self._layers, self._returns_tuple, strict=True)]  # fmt: skip
        setattr(parent, attribute, nn.ModuleList(stand_ins))
        try:
            hidden = self._hf.base_model(input_ids=self._ids, use_cache=False).last_hidden_state
        finally:
            setattr(parent, attribute, self._layers)
        return hidden[tuple(self._positions)].float()

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden).float()


class _StandIn(nn.Module):
    """In place of a layer: returns what it was given at the start, and has the attributes of the layer."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        self._replaced = (layer,)  # in a tuple, so that nn.Module does not register it
        self._output = output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


@contextlib.contextmanager
def computing_in_fp32(hf: Any) -> Iterator[None]:
    """Passes of a narrower model in fp32, without gradients and in evaluation mode.

    Weights are widened layer by layer while they are used, the head and the norms throughout: a 7B model in bf16 needs
    one layer and its head more memory, where widening it whole would need 14 GiB more. The narrow tensors themselves
    come back afterwards.
    """
    _, layers = find_layers(hf)
    narrow: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, recurse: bool = True) -> None:
        narrow[module] = [(p, p.data) for p in module.parameters(recurse) if p.dtype in NARROW]
        for parameter, data in narrow[module]:
            parameter.data = data.float()

    def restore(module: nn.Module) -> None:
        for parameter, data in narrow.pop(module):
            parameter.data = data

    def widen_output(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        return output.float() if output.dtype in NARROW else output

    inside = {id(m) for layer in layers for m in layer.modules()}
    was_training = hf.training
    hf.eval()
    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(lambda module, _: widen(module)))
            handles.append(layer.register_forward_hook(lambda module, *_: restore(module)))
        for module in hf.modules():
            if id(module) in inside:
                continue
            if isinstance(module, nn.Embedding):  # a table is too large to widen, what is read from it is not
                handles.append(module.register_forward_hook(widen_output))
            else:
                widen(module, recurse=False)
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(narrow):
            restore(module)
        hf.train(was_training)
