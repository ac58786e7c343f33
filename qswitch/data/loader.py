"""Which prompts come next: a seeded order that a checkpoint can resume exactly, and the held-out split.

The order of an epoch is a pure function of (seed, epoch); no global random state is read. Knows nothing of batches'
padding, devices or models.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qswitch.data.sources import iter_rows
from qswitch.data.template import Prompt
from qswitch.errors import DataError

if TYPE_CHECKING:
    import torch


LARGEST_SHUFFLED_LIST = 1 << 18
_WORD = 2**64 - 1


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


Item = TypeVar("Item", bound=_HasText)


class Permutation:
    """A permutation of 0..size-1 that is drawn from a key and takes constant memory.

    A Feistel network over the smallest power of four that holds `size`; an index that leaves the range walks on until
    it is back in it (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    ROUNDS = 6

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(key.encode(), digest_size=8 * self.ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(self.ROUNDS)]

    def __getitem__(self, index: int) -> int:
        while True:
            index = self._encrypt(index)
            if index < self.size:
                return index

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            # The finaliser of splitmix64: every bit of its input moves about half of its output.
            mixed = (right + key) & _WORD
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & self._mask)
        return left << self._half_bits | right


class _EpochOrder:
    """Endless indices 0..size-1, each once an epoch, in an order drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int, fingerprint: int) -> None:
        self.size, self.seed, self.fingerprint = size, seed, fingerprint
        self._start(epoch=0, cursor=0)

    def _start(self, epoch: int, cursor: int) -> None:
        self.epoch, self.cursor = epoch, cursor
        # A shuffled list where it is small; beyond, a permutation that is computed index by index and takes no memory.
        self.order: Sequence[int] | Permutation
        if self.size <= LARGEST_SHUFFLED_LIST:
            order = list(range(self.size))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self.order = order
        else:
            self.order = Permutation(self.size, f"{self.seed}:{epoch}")

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


class PromptSet(Protocol):
    """Prompts by index, in memory or read when asked for; None where a record does not become a prompt."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Prompt | None: ...

    @property
    def fingerprint(self) -> int:
        """A checksum of the content, for telling other data."""
        ...


class PromptsInMemory:
    """A set whose prompts are all there."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)
        self.fingerprint = 0
        for prompt in self.prompts:
            content = repr((prompt.example_id, prompt.prompt_ids, prompt.response_ids))
            self.fingerprint = zlib.crc32(content.encode(), self.fingerprint)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


@dataclass(frozen=True)
class Mixture:
    """Sets of prompts of which each gives its share of the examples, whatever its size."""

    sets: Sequence[PromptSet]
    weights: Sequence[float]

    def __len__(self) -> int:
        return sum(len(s) for s in self.sets)


class PromptLoader:
    """Endless prompts in seeded order; every epoch of a set hands out each of its prompts once.

    In a mixture the next prompt comes from the set that is furthest behind its share, so that after n prompts a set of
    weight w (of 1) has given n * w of them, within one. Each set has its own order and its own epochs.
    """

    def __init__(self, prompts: Sequence[Prompt] | PromptSet | Mixture, seed: int) -> None:
        if not len(prompts):
            raise DataError("There is no prompt to train on. Name more data, or lower data.num_validation.")
        if isinstance(prompts, Mixture):
            self._sets, weights = list(prompts.sets), list(prompts.weights)
        else:
            self._sets = [PromptsInMemory(prompts) if isinstance(prompts, Sequence) else prompts]
            weights = [1.0]
        self._shares = [w / sum(weights) for w in weights]
        self._taken = [0] * len(self._sets)
        self._orders = [_EpochOrder(len(s), seed, s.fingerprint) for s in self._sets]

    @property
    def epoch(self) -> int:
        """Number of the epoch that the furthest set is in."""
        return max(order.epoch for order in self._orders)

    def next(self, n: int) -> list[tuple[Prompt, int]]:
        """The next n prompts, each with its visit: how often that example has been handed out before.

        Raises:
            DataError: a whole epoch of a set held no usable prompt, or a record cannot be read.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        return [self._next() for _ in range(n)]

    def _next(self) -> tuple[Prompt, int]:
        total = sum(self._taken) + 1
        chosen = max(range(len(self._sets)), key=lambda i: (total * self._shares[i] - self._taken[i], -i))
        self._taken[chosen] += 1
        prompts, order = self._sets[chosen], self._orders[chosen]
        for _ in range(len(prompts)):
            index, epoch = order.next(1)[0]
            prompt = prompts[index]
            if prompt is not None:
                return prompt, epoch
        raise DataError(
            f"None of {len(prompts):,} records is left to train on: all are held out or longer than "
            "data.max_prompt_tokens. Raise data.max_prompt_tokens, or name other data."
        )

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
            + (f"Set data.num_validation={max(1, len(distinct) // 8)}, or name" if len(distinct) > 1 else "Name")
            + " a held-out file in data.validation."
        )

    held_out = set(sorted(distinct, key=lambda text: held_out_rank(text, seed))[:num])
    first: dict[str, Item] = {}
    for item in items:
        if item.text in held_out:
            first.setdefault(item.text, item)
    return [item for item in items if item.text not in held_out], list(first.values())


def held_out_rank(text: str, seed: int) -> bytes:
    """Prompts of the lowest ranks are held out: a draw that depends on the text and the seed alone."""
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()


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
