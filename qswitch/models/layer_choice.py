"""Which layers a cut should keep: those that leave the output nearest to the whole model's.

Layers go one at a time: of those that are tried, the one without which the model is nearest in KL(whole || cut), given
what has gone already. Trying every layer at every step would take layers^2 / 2 passes, so few texts say at first which
layers are worth trying, and later the last trial and the place do: those that added least, and the neighbours of
those that are gone, since a run of neighbours often costs less than its parts. In the end the choice is compared with
two that cost one pass each, and the nearest wins. Knows nothing of files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor

from qswitch.errors import ModelError
from qswitch.models.decoder_layers import LayerStack, ScoredRow, computing_in_fp32, find_layers

MAX_ROW_TOKENS = 48
MAX_POSITIONS = 256
"""Positions at which the output is compared; each costs a row of logits for every layer that is tried."""
MAX_TRIED = 4
"""Layers that are tried before one goes, besides neighbours."""
ROWS_AT_FIRST = 4
"""Every so many-th row is enough to find out which layers are worth trying."""
SAY_EVERY_S = 10.0

Example = tuple[str, str]
"""A prompt and its response."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """Layers that stay, and what it cost."""

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    kl_nats: float
    """KL(whole || cut) per position on the text by which they were chosen."""
    seconds: float


@cache
def calibration(use: Literal["choose", "check"]) -> tuple[Example, ...]:
    """This project's own examples: those by which layers are chosen, and others that the choice never sees."""
    lines = files("qswitch.models").joinpath("calibration.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return tuple((record["prompt"], record["response"]) for record in records if record["use"] == use)


def scored_rows(tokenizer: Any, examples: Sequence[Example]) -> list[ScoredRow]:
    """The examples as plain text, prompt, line feed and response, cut to MAX_ROW_TOKENS; every position is scored.

    Not as chats: in SmolLM2's template a third of the tokens are the same in every example. Which of the two chooses
    better was not settled by measurement.

    Raises:
        ModelError: there is no example.
    """
    rows = [ScoredRow(tuple(tokenizer(f"{p}\n{r}")["input_ids"][:MAX_ROW_TOKENS])) for p, r in examples]
    if not rows:
        raise ModelError("Choosing layers needs at least one example.")
    return rows


def choose_layers(
    hf: Any, rows: Sequence[ScoredRow], num_layers: int, *, notify: Callable[[str], None] | None = None
) -> LayerChoice:
    """The `num_layers` layers to keep, computed in fp32 whatever the weights are kept in; the same ones every time.

    Costs about layers / 8 passes over `rows`, and three for each layer that goes. Holds three hidden states of every
    row and layer, and MAX_POSITIONS rows of the vocabulary, in fp32.

    Args:
        notify: told how far it is, at most every SAY_EVERY_S seconds.

    Raises:
        ModelError: num_layers is below 1 or above the model's, or the model cannot be taken apart.
    """
    (choice,) = choices(hf, rows, [num_layers], notify=notify)
    return choice


def choices(
    hf: Any, rows: Sequence[ScoredRow], sizes: Sequence[int], *, notify: Callable[[str], None] | None = None
) -> list[LayerChoice]:
    """As `choose_layers`, for several numbers of layers in the time that the smallest takes alone."""
    started = time.monotonic()
    _, layers = find_layers(hf)
    for size in sizes:
        if not 1 <= size <= len(layers):
            raise ModelError(f"{type(hf).__name__} has {len(layers)} layers, so {size} cannot be kept.")
    found: dict[int, tuple[list[int], float]] = {}
    with computing_in_fp32(hf):
        search = _Search(hf, rows, min(sizes), notify)
        while True:
            size = len(search.kept)
            if size in sizes:
                found[size] = search.nearest()
            if size == min(sizes):
                break
            search.drop_one()
    seconds = time.monotonic() - started
    return [
        LayerChoice(
            kept=tuple(found[size][0]),
            dropped=tuple(sorted(set(range(len(layers))) - set(found[size][0]))),
            kl_nats=found[size][1],
            seconds=seconds,
        )
        for size in sizes
    ]


class _Search:
    """Layers that are still kept, fewer from call to call."""

    def __init__(self, hf: Any, rows: Sequence[ScoredRow], target: int, notify: Callable[[str], None] | None) -> None:
        self._notify, self._target = notify, target
        self._started = self._last_said = time.monotonic()
        self._stack = LayerStack(hf, rows, max_positions=MAX_POSITIONS)
        self._added: dict[int, float] = {}
        """KL that a layer added when it was last tried, nats."""
        self.kept = list(range(len(self._stack)))
        self.kl_nats = 0.0
        self._states = self._stack.states
        if target < len(self._stack):
            few = LayerStack(hf, rows[::ROWS_AT_FIRST], max_positions=MAX_POSITIONS // ROWS_AT_FIRST)
            for layer in self.kept:
                after = few.through(self.kept[layer + 1 :], few.states[layer])
                self._added[layer] = few.kl_nats(after[len(few)])
                self._say(f"{layer + 1} of {len(few)} tried")

    def drop_one(self) -> None:
        """One layer goes: of those that are worth trying, the one without which the output is nearest."""
        best: tuple[float, int, dict[int, Tensor]] | None = None
        for layer in _worth_trying(self.kept, self._added):
            after = self._stack.through([i for i in self.kept if i > layer], self._states[layer])
            score = self._stack.kl_nats(after[len(self._stack)])
            self._added[layer] = score - self.kl_nats
            if best is None or (score, layer) < best[:2]:
                best = (score, layer, after)
        assert best is not None
        self.kl_nats, gone, after = best
        self._states = {i: state for i, state in self._states.items() if i < gone} | after
        self.kept.remove(gone)
        self._say(f"{len(self.kept)} left, to be {self._target}; KL {self.kl_nats:.2f} nats/token")

    def nearest(self) -> tuple[list[int], float]:
        """The kept layers, or as many chosen by the hidden state where their KL is lower; and that KL, nats."""
        found = [(self.kl_nats, list(self.kept))]
        for kept in _by_hidden_change(self._stack, len(self.kept)):
            last = self._stack.through(kept, self._stack.states[0])[len(self._stack)]
            found.append((self._stack.kl_nats(last), kept))
        kl_nats, kept = min(found)
        return kept, kl_nats

    def _say(self, text: str) -> None:
        if self._notify is not None and time.monotonic() - self._last_said >= SAY_EVERY_S:
            self._last_said = time.monotonic()
            self._notify(f"choosing layers: {text}, {self._last_said - self._started:.0f} s")


def _worth_trying(kept: Sequence[int], added: dict[int, float]) -> list[int]:
    """Layers that may be the next to go: those that added least, and the cheapest neighbours of gaps."""
    ranked = sorted(kept, key=lambda i: (added[i], i))
    beside_gap = [i for i in ranked if {i - 1, i + 1} - set(kept) - {-1, len(added)}]
    return list(dict.fromkeys([*ranked[:MAX_TRIED], *beside_gap[: MAX_TRIED // 2]]))


def _by_hidden_change(stack: LayerStack, num_layers: int) -> list[list[int]]:
    """Layers to keep by how much the hidden state changes (1 - cosine): all but those that change it least one by one,
    and all but the run of layers that changes it least together (Gromov et al. 2024)."""
    num_dropped = len(stack) - num_layers

    def change(first: int, count: int) -> float:
        before, after = stack.states[first], stack.states[first + count]
        return float((1 - torch.cosine_similarity(before, after, dim=-1)).mean())

    least = sorted(range(len(stack)), key=lambda i: (change(i, 1), i))[:num_dropped]
    start = min(range(num_layers + 1), key=lambda i: (change(i, num_dropped), i))
    gone = (set(least), set(range(start, start + num_dropped)))
    return [[i for i in range(len(stack)) if i not in dropped] for dropped in gone]


def kl_of_choice(hf: Any, rows: Sequence[ScoredRow], kept: Sequence[int]) -> float:
    """Mean KL(whole || the layers `kept` of it) over the scored positions of the rows, nats, computed in fp32."""
    everywhere = sum(len(row.ids) - row.first for row in rows)
    with computing_in_fp32(hf):
        stack = LayerStack(hf, rows, max_positions=everywhere)
        return stack.kl_nats(stack.through(kept, stack.states[0])[len(stack)])
