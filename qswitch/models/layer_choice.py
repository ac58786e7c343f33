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
from qswitch.models.layers import LayerStack, ScoredRow, computing_in_fp32, find_layers

MAX_ROW_TOKENS = 48
MAX_POSITIONS = 256
"""Positions at which the output is compared; each costs a row of logits for every layer that is tried."""
MAX_TRIED = 4
"""Layers that are tried before one goes, besides neighbours. With 8, SmolLM2-135M lost the same layers."""
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
    num_tried: int
    """Models that were scored."""
    seconds: float


@cache
def calibration(use: Literal["choose", "check"]) -> tuple[Example, ...]:
    """This project's own examples: those by which layers are chosen, and others that the choice never sees."""
    lines = files("qswitch.models").joinpath("calibration.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return tuple((record["prompt"], record["response"]) for record in records if record["use"] == use)


def scored_rows(tokenizer: Any, examples: Sequence[Example]) -> list[ScoredRow]:
    """The examples as plain text, prompt, line feed and response, cut to MAX_ROW_TOKENS; every position is scored.

    In SmolLM2's own chat template a third of the tokens are the same in every example, and choices by it were no
    better on chats.

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
    started = last_said = time.monotonic()
    _, layers = find_layers(hf)
    if not 1 <= num_layers <= len(layers):
        raise ModelError(f"{type(hf).__name__} has {len(layers)} layers, so {num_layers} cannot be kept.")
    everything = list(range(len(layers)))
    if num_layers == len(layers):
        return LayerChoice(kept=tuple(everything), dropped=(), kl_nats=0.0, num_tried=0, seconds=0.0)

    def say(text: str) -> None:
        nonlocal last_said
        if notify is not None and time.monotonic() - last_said >= SAY_EVERY_S:
            last_said = time.monotonic()
            notify(f"choosing layers: {text}, {last_said - started:.0f} s")

    num_tried = 0
    with computing_in_fp32(hf):
        few = LayerStack(hf, rows[::ROWS_AT_FIRST], max_positions=MAX_POSITIONS // ROWS_AT_FIRST)
        added = {}  # KL that a layer added when it was last tried
        for layer in everything:
            added[layer] = few.kl_nats(few.through(everything[layer + 1 :], few.states[layer])[len(few)])
            say(f"{layer + 1} of {len(layers)} tried")
        stack = LayerStack(hf, rows, max_positions=MAX_POSITIONS)
        kept, kl, states = list(everything), 0.0, stack.states
        while len(kept) > num_layers:
            best: tuple[float, int, dict[int, Tensor]] | None = None
            for layer in _worth_trying(kept, added):
                after = stack.through([i for i in kept if i > layer], states[layer])
                score = stack.kl_nats(after[len(stack)])
                added[layer] = score - kl
                num_tried += 1
                if best is None or (score, layer) < best[:2]:
                    best = (score, layer, after)
            assert best is not None
            kl, layer, after = best
            states = {i: state for i, state in states.items() if i < layer} | after
            kept.remove(layer)
            say(f"{len(kept)} left, to be {num_layers}; KL {kl:.2f} nats/token")
        for other in _by_hidden_change(stack, num_layers):
            score = stack.kl_nats(stack.through(other, stack.states[0])[len(stack)])
            num_tried += 1
            if score < kl:
                kept, kl = other, score
    return LayerChoice(
        kept=tuple(kept),
        dropped=tuple(i for i in everything if i not in kept),
        kl_nats=kl,
        num_tried=num_tried,
        seconds=time.monotonic() - started,
    )


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


def kl_of_choice(hf: Any, rows: Sequence[ScoredRow], kept: Sequence[int], *, max_positions: int | None = None) -> float:
    """Mean KL(whole || the layers `kept` of it) over the scored positions of the rows, nats, computed in fp32."""
    everywhere = sum(len(row.ids) - row.first for row in rows)
    with computing_in_fp32(hf):
        stack = LayerStack(hf, rows, max_positions=max_positions or everywhere)
        return stack.kl_nats(stack.through(kept, stack.states[0])[len(stack)])
