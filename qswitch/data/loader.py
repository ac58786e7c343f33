"""Which prompts come next: a seeded order that a checkpoint can resume exactly.

The order of an epoch is a pure function of (seed, set, epoch); no global random state is read. Knows nothing of
batches' padding, devices or models.
"""

from __future__ import annotations

import array
import functools
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qswitch.data.prompt_table import PromptTable
from qswitch.data.shares import furthest_behind
from qswitch.data.sources import iter_rows
from qswitch.data.template import Prompt
from qswitch.errors import DataError

if TYPE_CHECKING:
    import torch


class _EpochOrder:
    """Endless indices 0..size-1, each once an epoch, in an order drawn from (seed, epoch) and the set's number, so that
    of parallel sets of one size a step does not get the same rows twice."""

    def __init__(self, size: int, seed: int, fingerprint: int, *, set_number: int = 0) -> None:
        self.size, self.seed, self.fingerprint = size, seed, fingerprint
        self._set = f"{set_number}:" if set_number else ""
        self._start(epoch=0, cursor=0)

    def _start(self, epoch: int, cursor: int) -> None:
        self.epoch, self.cursor = epoch, cursor
        self.order = array.array("q", range(self.size))
        random.Random(f"{self.seed}:{self._set}{epoch}").shuffle(self.order)  # type: ignore[arg-type]

    def next(self, n: int) -> list[tuple[int, int]]:
        """The next n (index, epoch) pairs."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        taken: list[tuple[int, int]] = []
        while len(taken) < n:
            if self.cursor == self.size:
                self._start(self.epoch + 1, 0)
            taken.append((self.order[self.cursor], self.epoch))
            self.cursor += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands: a few integers, fit for JSON."""
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "seed": self.seed,
            "size": self.size,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` as if never stopped.

        Raises:
            DataError: the state belongs to other data or another seed.
        """
        for name, here in (("size", self.size), ("seed", self.seed), ("fingerprint", self.fingerprint)):
            if state[name] != here:
                raise DataError(
                    f"The data changed since the checkpoint ({name} was {state[name]}, is {here}). Resume with the "
                    "same data, tokenizer and seed, or start a new run."
                )
        self._start(state["epoch"], state["cursor"])


@dataclass(frozen=True)
class Mixture:
    """Sets of prompts of which each gives its share of the examples, whatever its size."""

    sets: Sequence[Sequence[Prompt]]
    weights: Sequence[float]

    def __len__(self) -> int:
        return sum(len(s) for s in self.sets)


def _fingerprint(prompts: Sequence[Prompt]) -> int:
    """A checksum of the content, for telling other data."""
    if isinstance(prompts, PromptTable):
        return prompts.fingerprint
    content = ((p.example_id, p.prompt_ids, p.response_ids) for p in prompts)
    return functools.reduce(lambda crc, one: zlib.crc32(repr(one).encode(), crc), content, 0)


class PromptLoader:
    """Endless prompts in seeded order; every epoch of a set hands out each of its prompts once.

    In a mixture the next prompt comes from the set that is furthest behind its share, so that after n prompts a set of
    weight w (of 1) has given n * w of them, within one. Each set has its own order and its own epochs.
    """

    def __init__(self, prompts: Sequence[Prompt] | Mixture, seed: int) -> None:
        if not len(prompts):
            raise DataError("There is no prompt to train on. Name more data, or lower data.num_validation.")
        mixture = prompts if isinstance(prompts, Mixture) else Mixture([prompts], [1.0])
        self._sets, self._weights = list(mixture.sets), mixture.weights
        self._taken = [0] * len(self._sets)
        self._orders = [_EpochOrder(len(s), seed, _fingerprint(s), set_number=i) for i, s in enumerate(self._sets)]

    @property
    def epoch(self) -> int:
        """Number of the epoch that the furthest set is in."""
        return max(order.epoch for order in self._orders)

    def next(self, n: int) -> list[tuple[Prompt, int]]:
        """The next n prompts, each with its visit: how often that example has been handed out before."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        return [self._next() for _ in range(n)]

    def _next(self) -> tuple[Prompt, int]:
        chosen = furthest_behind(self._weights, self._taken)
        self._taken[chosen] += 1
        ((index, epoch),) = self._orders[chosen].next(1)
        return self._sets[chosen][index], epoch

    def state_dict(self) -> dict[str, Any]:
        """Cursors and epochs, and what they are valid for; fit for JSON."""
        return {"sets": [order.state_dict() for order in self._orders], "taken": list(self._taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` as if never stopped.

        Raises:
            DataError: the state belongs to other prompts or another seed.
        """
        if "sets" not in state:
            raise DataError("The checkpoint is of an older qswitch and cannot be resumed. Start a new run.")
        if len(state["sets"]) != len(self._orders):
            raise DataError(
                f"The data changed since the checkpoint: it had {len(state['sets'])} weighted sets, now "
                f"{len(self._orders)}. Resume with the same data.train and data.weights, or start a new run."
            )
        for order, saved in zip(self._orders, state["sets"], strict=True):
            order.load_state_dict(saved)
        self._taken = list(state["taken"])


class PassageLoader:
    """Endless passages of a token stream in seeded order, without overlap; the rest at the end is left out.

    Args:
        token_ids: the corpus, int64 [N].
        passage_tokens: length of a passage.
        seed: draws the order of the passages.
    """

    def __init__(self, token_ids: torch.Tensor, passage_tokens: int, seed: int) -> None:
        num_passages = token_ids.numel() // passage_tokens
        if num_passages == 0:
            raise DataError(
                f"data.lm_corpus has {token_ids.numel()} tokens, less than one passage of "
                f"loss.lm_passage_tokens={passage_tokens}. Add text or lower loss.lm_passage_tokens."
            )
        self.passages = token_ids[: num_passages * passage_tokens].reshape(num_passages, passage_tokens)
        fingerprint = zlib.crc32(self.passages.contiguous().numpy().tobytes())
        self._order = _EpochOrder(num_passages, seed, fingerprint)

    def next(self, n: int) -> torch.Tensor:
        """The next n passages: int64 [n, passage_tokens]."""
        return self.passages[[index for index, _ in self._order.next(n)]]

    def state_dict(self) -> dict[str, Any]:
        """Cursor and epoch, and what they are valid for; fit for JSON."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` as if never stopped.

        Raises:
            DataError: the state belongs to another corpus, passage length or seed.
        """
        self._order.load_state_dict(state)


def load_corpus_tokens(
    reference: str | list[str], tokenizer: Any, *, split: str = "train", max_tokens: int | None = None
) -> torch.Tensor:
    """Plain text as one stream of token ids [N], int64, an end token after every document; N at most `max_tokens`.

    `reference` names text files (a document each), records with a `text` column, folders or hub ids. Nothing is read
    beyond `max_tokens`; hub data sets are read as they arrive.

    Raises:
        DataError: a file that cannot be read, or a record without text.
    """
    import torch

    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    pieces: list[torch.Tensor] = []
    texts: list[str] = []
    num_tokens = 0

    def tokenize() -> None:
        nonlocal num_tokens
        for ids in tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
            pieces.append(torch.tensor([*ids, *end], dtype=torch.long))
            num_tokens += pieces[-1].numel()
        texts.clear()

    for row in iter_rows(reference, split=split, text_files=True, stream_hub=True):
        text = row.fields.get("text")
        if not isinstance(text, str):
            raise DataError(
                f"{row.where}: data.lm_corpus needs a column text that holds text. Columns: {', '.join(row.fields)}."
            )
        if text.strip():
            texts.append(text)
        if len(texts) == 256:
            tokenize()
            if max_tokens is not None and num_tokens >= max_tokens:
                break
    if texts:
        tokenize()
    if not pieces:
        raise DataError(f"data.lm_corpus {reference} holds no text. Name a file that does.")
    return torch.cat(pieces)[:max_tokens]
