"""Which prompts come next: a seeded order that a checkpoint can resume exactly, and the held-out split.

The order of an epoch is a pure function of (seed, epoch); no global random state is read. Knows nothing of batches'
padding, devices or models.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qswitch.data.prompts import Prompt
from qswitch.data.sources import iter_rows
from qswitch.errors import DataError

if TYPE_CHECKING:
    import torch


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


Item = TypeVar("Item", bound=_HasText)


class _EpochOrder:
    """Endless indices 0..size-1, each once an epoch, in an order drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int, fingerprint: int) -> None:
        self.size, self.seed, self.fingerprint = size, seed, fingerprint
        self._start(epoch=0, cursor=0)

    def _start(self, epoch: int, cursor: int) -> None:
        self.epoch, self.cursor = epoch, cursor
        self.order = list(range(self.size))
        random.Random(f"{self.seed}:{epoch}").shuffle(self.order)

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


class PromptLoader:
    """Endless prompts in seeded order; every epoch hands out each prompt once."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("There is no prompt to train on. Name more data, or lower data.num_validation.")
        self.prompts = list(prompts)
        fingerprint = 0
        for prompt in self.prompts:
            content = repr((prompt.example_id, prompt.prompt_ids, prompt.response_ids))
            fingerprint = zlib.crc32(content.encode(), fingerprint)
        self._order = _EpochOrder(len(self.prompts), seed, fingerprint)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last prompt came from."""
        return self._order.epoch

    def next(self, n: int) -> list[tuple[Prompt, int]]:
        """The next n prompts, each with its visit: how often that example has been handed out before."""
        return [(self.prompts[index], epoch) for index, epoch in self._order.next(n)]

    def state_dict(self) -> dict[str, Any]:
        """Cursor and epoch, and what they are valid for; fit for JSON."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` as if never stopped.

        Raises:
            DataError: the state belongs to other prompts or another seed.
        """
        self._order.load_state_dict(state)


class BlockLoader:
    """Endless blocks of a token stream in seeded order, without overlap; the rest at the end is left out.

    Args:
        token_ids: the corpus, int64 [N].
        block_tokens: length of a block.
        seed: draws the order of the blocks.
    """

    def __init__(self, token_ids: torch.Tensor, block_tokens: int, seed: int) -> None:
        num_blocks = token_ids.numel() // block_tokens
        if num_blocks == 0:
            raise DataError(
                f"data.lm_corpus has {token_ids.numel()} tokens, less than one block of "
                f"loss.lm_block_tokens={block_tokens}. Add text or lower loss.lm_block_tokens."
            )
        self.blocks = token_ids[: num_blocks * block_tokens].reshape(num_blocks, block_tokens)
        fingerprint = zlib.crc32(self.blocks.contiguous().numpy().tobytes())
        self._order = _EpochOrder(num_blocks, seed, fingerprint)

    def next(self, n: int) -> torch.Tensor:
        """The next n blocks: int64 [n, block_tokens]."""
        return self.blocks[[index for index, _ in self._order.next(n)]]

    def state_dict(self) -> dict[str, Any]:
        """Cursor and epoch, and what they are valid for; fit for JSON."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state` as if never stopped.

        Raises:
            DataError: the state belongs to another corpus, block length or seed.
        """
        self._order.load_state_dict(state)


def split_validation(items: Sequence[Item], num: int, seed: int) -> tuple[list[Item], list[Item]]:
    """(training, validation) of records or prompts: `num` distinct prompt texts held out, in no order of the data.

    Which texts are held out is a pure function of (seed, text), so the split hardly moves when data is added. Every
    record that repeats a held-out text leaves training too, and validation has one record a text.

    Raises:
        DataError: fewer than num + 1 distinct prompts.
    """
    distinct = {item.text for item in items}
    if len(distinct) <= num:
        raise DataError(
            f"data.num_validation={num} leaves nothing to train on: the data has {len(distinct)} distinct prompts. "
            f"Set data.num_validation={max(1, len(distinct) // 8)}, or name a held-out file in data.validation."
        )

    def rank(text: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()

    held_out = set(sorted(distinct, key=rank)[:num])
    first: dict[str, Item] = {}
    for item in items:
        if item.text in held_out:
            first.setdefault(item.text, item)
    return [item for item in items if item.text not in held_out], list(first.values())


def load_corpus_tokens(reference: str | list[str], tokenizer: Any, *, split: str = "train") -> torch.Tensor:
    """Plain text as one stream of token ids [N], int64, an end token after every document.

    `reference` names text files (a document each), records with a `text` column, folders or hub ids.

    Raises:
        DataError: a file that cannot be read, or a record without text.
    """
    import torch

    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    pieces: list[torch.Tensor] = []
    texts: list[str] = []

    def tokenize() -> None:
        for ids in tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
            pieces.append(torch.tensor([*ids, *end], dtype=torch.long))
        texts.clear()

    for row in iter_rows(reference, split=split, text_files=True):
        text = row.fields.get("text")
        if not isinstance(text, str):
            raise DataError(
                f"{row.where}: data.lm_corpus needs a column text that holds text. Columns: {', '.join(row.fields)}."
            )
        if text.strip():
            texts.append(text)
        if len(texts) == 256:
            tokenize()
    if texts:
        tokenize()
    if not pieces:
        raise DataError(f"data.lm_corpus {reference} holds no text. Name a file that does.")
    return torch.cat(pieces)
